"""Pictures in and out, for who shows predictions; decoded as the data sets decode them."""

import os
from pathlib import Path

from PIL import Image
from torch import Tensor

from models.data.images import read_image

__all__ = ["read_image", "write_image"]


def write_image(image: Tensor, path: Path) -> None:
    """Write a (3, H, W) uint8 tensor as PNG; whoever looks sees the whole picture or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(temporary, format="PNG")
    os.replace(temporary, path)
