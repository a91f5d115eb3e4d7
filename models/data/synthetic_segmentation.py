"""Pictures of coloured shapes with exact masks, made on the fly from a seed and an index."""

import numpy as np
import numpy.typing as npt
import torch

from models.data.segmentation_transforms import SegmentationTransform
from models.data.synthetic import Synthetic
from models.data.voc_classes import VOID
from models.task import Sample, Split

__all__ = ["SYNTHETIC_CLASSES", "SyntheticSegmentation"]

SYNTHETIC_CLASSES: tuple[str, ...] = ("disc", "square", "triangle")
"""The classes without background, in the order of their labels."""

_BORDER = 2
"""Width in pixels of the void ring around a shape, as VOC's masks have one."""
_COLOURS = np.array([[200, 60, 60], [60, 180, 80], [70, 90, 210]])
_UNLABELLED_EVERY, _UNLABELLED_AT = 16, 5

_Ints = npt.NDArray[np.int64]
_Bytes = npt.NDArray[np.uint8]


class SyntheticSegmentation(Synthetic):
    """0 to 3 shapes on a textured background; one picture in 16 has no labelled pixel at all.

    Only integers are drawn and computed, so a picture has the same bytes on every machine.

    Args:
        split: training and validation pictures are different ones.
        length: number of pictures.
        image_size: height and width in pixels.
        seed: another seed gives other pictures.
        transform: applied to every picture and its mask.
    """

    def __init__(
        self, split: Split, length: int, image_size: tuple[int, int], seed: int, transform: SegmentationTransform
    ) -> None:
        super().__init__(split, length, seed)
        self._image_size = image_size
        self._transform = transform

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``; its target ``mask`` is (H, W) uint8."""
        rng = self._generator(index)
        image_HW3 = _background(rng, self._image_size)
        mask_HW = np.zeros(self._image_size, dtype=np.uint8)
        for _ in range(rng.integers(0, 4)):
            _paint_shape(rng, image_HW3, mask_HW)
        if index % _UNLABELLED_EVERY == _UNLABELLED_AT:
            mask_HW[:] = VOID
        image = torch.from_numpy(image_HW3).permute(2, 0, 1).contiguous()
        return Sample(*self._transform(image, torch.from_numpy(mask_HW)), index)


def _background(rng: np.random.Generator, size: tuple[int, int]) -> _Bytes:
    """(H, W, 3): noise in blocks of 16 pixels plus finer noise in blocks of 2."""
    coarse = rng.integers(40, 190, (-(-size[0] // 16), -(-size[1] // 16), 3), dtype=np.uint8)
    fine = rng.integers(0, 40, (-(-size[0] // 2), -(-size[1] // 2), 1), dtype=np.uint8)
    return _enlarge(coarse, 16, size) + _enlarge(fine, 2, size)


def _enlarge(blocks: _Bytes, factor: int, size: tuple[int, int]) -> _Bytes:
    return blocks.repeat(factor, axis=0).repeat(factor, axis=1)[: size[0], : size[1]]


def _paint_shape(rng: np.random.Generator, image_HW3: _Bytes, mask_HW: _Bytes) -> None:
    """Paint one shape over what is there, with its label and a void ring around it."""
    height, width = mask_HW.shape
    label = int(rng.integers(1, len(SYNTHETIC_CLASSES) + 1))
    radius = int(rng.integers(min(height, width) // 8, min(height, width) // 3 + 1))
    top, left = int(rng.integers(0, height)) - radius, int(rng.integers(0, width)) - radius
    colour = np.clip(_COLOURS[label - 1] + rng.integers(-40, 41, 3), 0, 255)
    # Only the rows and columns that the shape and its ring can reach.
    rows = slice(max(top - _BORDER, 0), min(top + 2 * radius + _BORDER + 1, height))
    columns = slice(max(left - _BORDER, 0), min(left + 2 * radius + _BORDER + 1, width))
    dy = np.arange(height)[rows, None] - (top + radius)
    dx = np.arange(width)[None, columns] - (left + radius)
    inside = _covers(label, dy, dx, radius)
    mask_HW[rows, columns][_covers(label, dy, dx, radius + _BORDER)] = VOID
    mask_HW[rows, columns][inside] = label
    image_HW3[rows, columns][inside] = colour


def _covers(label: int, dy: _Ints, dx: _Ints, radius: int) -> npt.NDArray[np.bool_]:
    """Which pixels at (dy, dx) from the centre a shape of that radius covers."""
    if label == 1:
        return np.asarray(dy**2 + dx**2 <= radius**2)
    if label == 2:
        return np.asarray(np.maximum(np.abs(dy), np.abs(dx)) <= radius)
    return np.asarray((dy <= radius) & (2 * np.abs(dx) <= dy + radius))
