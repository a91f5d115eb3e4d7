"""Pictures in and out, for who shows predictions; decoded as the data sets decode them."""

import math
import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid

from models.data.images import read_image

__all__ = ["beside", "contact_sheet", "encode_image", "read_image", "write_image"]

_GAP = 4
_WHITE = 255.0


def encode_image(image: Tensor) -> bytes:
    """A (3, H, W) uint8 tensor as a PNG file."""
    buffer = BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def write_image(image: Tensor, path: Path) -> None:
    """Write a (3, H, W) uint8 tensor as PNG; whoever looks sees the whole picture or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(encode_image(image))
    os.replace(temporary, path)


def contact_sheet(pictures: Sequence[Tensor], *, columns: int | None = None, side: int = 256) -> Tensor:
    """Pictures on one white sheet, row by row, each in the middle of a cell that is as large as the largest.

    Args:
        pictures: (3, H, W) uint8 each, of any sizes; at least one.
        columns: how many stand beside each other; None: about as many as below each other.
        side: pixels of the longer side of each: larger ones are made smaller.
    """
    small = [_fit(picture, side) for picture in pictures]
    height, width = (max(picture.shape[dim] for picture in small) for dim in (1, 2))
    cells = [_centred(picture, height, width) for picture in small]
    columns = columns or math.ceil(math.sqrt(len(cells)))
    sheet: Tensor = make_grid(torch.stack(cells), nrow=columns, padding=_GAP, pad_value=_WHITE)
    return sheet.to(torch.uint8)


def beside(left: Tensor, right: Tensor) -> Tensor:
    """Two (3, H, W) uint8 pictures of one size on one, with a white line between them."""
    line = left.new_full((3, left.shape[1], _GAP), 255)
    return torch.cat([left, line, right], dim=2)


def _fit(picture: Tensor, side: int) -> Tensor:
    """Its longer side has ``side`` pixels at most."""
    height, width = picture.shape[-2:]
    factor = min(1.0, side / max(height, width))
    size = [max(1, round(factor * length)) for length in (height, width)]
    small: Tensor = TF.resize(picture.cpu(), size, antialias=True)
    return small


def _centred(picture: Tensor, height: int, width: int) -> Tensor:
    top, left = (height - picture.shape[1]) // 2, (width - picture.shape[2]) // 2
    bottom, right = height - picture.shape[1] - top, width - picture.shape[2] - left
    return F.pad(picture.float(), (left, right, top, bottom), value=_WHITE)
