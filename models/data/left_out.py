"""Entries that training leaves out with a warning, since they do no harm."""

import warnings
from collections.abc import Sequence

from models.errors import DataError, OnError, raise_error

__all__ = ["warn_left_out"]


def warn_left_out(summary: str, boxes: Sequence[str], on_error: OnError) -> None:
    """Warn once of all, or tell of each whoever wants to know of everything.

    Args:
        summary: what the warning says.
        boxes: names of boxes without width or height; if there are none, nothing is said.
        on_error: of the data set that calls this in its constructor.
    """
    if on_error is not raise_error:
        for box in boxes:
            on_error(DataError(f"{box} lacks width or height: training leaves it out", "box without extent"))
    elif boxes:
        warnings.warn(summary, stacklevel=3)
