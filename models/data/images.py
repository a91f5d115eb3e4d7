"""Reading image files; a file that cannot be read is named."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.errors import DataError

__all__ = ["read_image", "read_mask"]


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
                raise DataError(f"{path} has mode {image.mode}: a mask must be a palette or greyscale image of indices")
            return np.array(image if mode is None else image.convert(mode), dtype=np.uint8)
    except FileNotFoundError as error:
        raise DataError(f"missing image: {path}") from error
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for truncated and foreign files
        if isinstance(error, DataError):
            raise
        raise DataError(f"broken image: {path}: {error}") from error
