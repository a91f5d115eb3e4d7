"""What models/ raises when its input is wrong: each message names the thing and the remedy."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

__all__ = ["DataError", "OnError", "TaskError", "Trouble", "raise_error", "reported"]

Trouble = Literal[
    "wrong layout",
    "missing file",
    "broken file",
    "missing annotation",
    "wrong annotation",
    "box outside its image",
    "box without extent",
    "unknown label",
    "mask of another size",
]
"""Kinds of what may be wrong with a data set. A wrong layout says that a whole split cannot be read."""


class TaskError(ValueError):
    """A task, a model or an option of it that does not exist or does not fit."""


class DataError(TaskError):
    """A data set that is missing, incomplete or broken.

    Args:
        message: names the file.
        kind: what it is listed under.
    """

    def __init__(self, message: str, kind: Trouble = "wrong layout") -> None:
        super().__init__(message)
        self.kind = kind


OnError = Callable[[DataError], None]
"""Is told what is wrong with an entry of a data set. It raises, or returns, and then the entry is left out."""


def raise_error(error: DataError) -> None:
    """The ``OnError`` of training: the first wrong entry ends it."""
    raise error


@contextmanager
def reported(on_error: OnError) -> Iterator[None]:
    """A ``DataError`` in the block goes to ``on_error``, and the rest of the block is left out."""
    try:
        yield
    except DataError as error:
        on_error(error)
