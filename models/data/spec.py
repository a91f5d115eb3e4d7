"""``--data``: which source, and where it lies."""

from pathlib import Path
from typing import NamedTuple

from models.errors import DataError

__all__ = ["DataSpec", "parse_data_spec"]


class DataSpec(NamedTuple):
    """A parsed ``--data``."""

    kind: str
    """``synthetic``, ``banana``, ``voc``, ``coco``, ``masks``, ``folder`` or ``cifar10``."""
    path: Path
    """Folder of the data; meaningless for ``synthetic``."""


def parse_data_spec(text: str, supported: tuple[str, ...]) -> DataSpec:
    """Parse ``synthetic`` or ``KIND:PATH``; the folder must exist.

    Raises:
        DataError: if the kind is unknown or not among ``supported``, or the folder is missing.
    """
    kind, _, rest = text.partition(":")
    forms = ", ".join(kind if kind == "synthetic" else f"{kind}:PATH" for kind in supported)
    if kind not in supported:
        raise DataError(f"--data {text!r} is not understood here: use one of {forms}")
    if kind == "synthetic":
        if rest:
            raise DataError(f"--data {text!r}: synthetic takes no path")
        return DataSpec(kind, Path())
    if not rest:
        raise DataError(f"--data {text!r} lacks its folder: write {kind}:PATH")
    path = Path(rest).expanduser()
    if not path.is_dir():
        raise DataError(f"--data {text}: no such folder: {path}; check the path")
    return DataSpec(kind, path)
