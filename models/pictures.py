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
    """Pictures on one white sheet, row by row.

    Args:
        pictures: (3, H, W) uint8 each, of any sizes; at least one.
        columns: how many stand beside each other; None: about as many as below each other.
        side: pixels of the longer side of each: larger ones are made smaller.
    """
    cells = [_fit(picture, side) for picture in pictures]
    columns = columns or math.ceil(math.sqrt(len(cells)))
    sheet: Tensor = make_grid(torch.stack(cells), nrow=columns, padding=_GAP, pad_value=_WHITE)
    return sheet.to(torch.uint8)


def beside(left: Tensor, right: Tensor) -> Tensor:
    """Two (3, H, W) uint8 pictures of one size on one, with a white line between them."""
    line = left.new_full((3, left.shape[1], _GAP), 255)
    return torch.cat([left, line, right], dim=2)


def _fit(picture: Tensor, side: int) -> Tensor:
    """In the middle of a white square of ``side`` pixels."""
    height, width = picture.shape[-2:]
    factor = min(1.0, side / max(height, width))
    height, width = (max(1, round(factor * length)) for length in (height, width))
    small = TF.resize(picture.cpu(), [height, width], antialias=True)
    left, top = (side - width) // 2, (side - height) // 2
    return F.pad(small.float(), (left, side - width - left, top, side - height - top), value=_WHITE)
