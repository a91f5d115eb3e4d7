"""Reading image files; a file that cannot be read is named."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from models.errors import DataError

__all__ = ["DecodedImages", "read_image", "read_mask"]


class DecodedImages:
    """Keeps what was decoded, up to a limit; another process that gets a copy of it begins with nothing.

    What came first stays: an epoch asks for everything once in a new order, so whatever were put out for it would be
    asked for before it comes back.

    Args:
        limit_bytes: how much is kept; 0 keeps nothing.
    """

    def __init__(self, limit_bytes: int = 0) -> None:
        self._left = self._limit = limit_bytes
        self._kept: dict[Path, Tensor] = {}

    def get(self, path: Path, decode: Callable[[Path], Tensor] = lambda path: read_image(path)) -> Tensor:
        """What a file holds, which nobody may change.

        Args:
            path: the file.
            decode: reads it.

        Raises:
            DataError: if it cannot be read.
        """
        found = self._kept.get(path)
        if found is None:
            found = decode(path)
            if found.nbytes <= self._left:
                self._left -= found.nbytes
                self._kept[path] = found
        return found

    def __reduce__(self) -> tuple[type["DecodedImages"], tuple[int]]:
        return type(self), (self._limit,)


def read_image(path: Path) -> Tensor:
    """Decode an image file to a (3, H, W) uint8 tensor.

    Raises:
        DataError: if the file is missing or broken.
    """
    return torch.from_numpy(_decode(path, "RGB")).permute(2, 0, 1).contiguous()


def read_mask(path: Path) -> Tensor:
    """Decode a palette or greyscale mask to its (H, W) uint8 class indices.

    Raises:
        DataError: if the file is missing, broken, or not a mask of indices.
    """
    return torch.from_numpy(_decode(path, None))


def _decode(path: Path, mode: str | None) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    try:
        with Image.open(path) as image:
            if mode is None and image.mode not in ("P", "L"):
                raise DataError(
                    f"{path} has mode {image.mode}: a mask must be a palette or greyscale image of indices",
                    "wrong annotation",
                )
            return np.array(image if mode is None else _in_8_bits(image, path).convert(mode), dtype=np.uint8)
    except FileNotFoundError as error:
        raise DataError(f"missing image: {path}", "missing file") from error
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder: name image files", "missing file") from error
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for truncated and foreign files
        if isinstance(error, DataError):
            raise
        said = "no format that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(
            f"broken image: {path}: {said}; replace it, or take it out of the data set", "broken file"
        ) from error


def _in_8_bits(image: Image.Image, path: Path) -> Image.Image:
    """As it is, or the upper half of 16 bits: Pillow would make all above 255 white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DataError(f"{path} has mode {image.mode}: save it as a PNG of 8 or 16 bits", "broken file")
    return image
