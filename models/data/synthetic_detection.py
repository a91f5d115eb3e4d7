"""Images with coloured shapes, made on the fly from seed and index: detection without any file."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.data.detection_sample import detection_sample
from models.data.detection_transforms import DetectionTransform
from models.data.synthetic import Synthetic
from models.errors import DataError
from models.task import Sample, Split

__all__ = ["SHAPES", "SyntheticDetection", "draw_shapes"]

SHAPES = ("disc", "square", "triangle")
"""What is drawn for the labels 0, 1 and 2."""
_COLOURS = np.array([(220, 50, 40), (40, 80, 220), (40, 200, 60)], dtype=np.int64)
_EMPTY = 1 / 8  # part of the images that show nothing
_MAX_SHAPES = 3
_Pixels = NDArray[np.uint8]


class SyntheticDetection(Synthetic):
    """Shapes on a noisy background: one to three in an image, none in one image of eight.

    Image ``index`` depends on nothing but the seed, the split and the index.

    Args:
        split: train or val; their images differ.
        length: number of images.
        seed: of the whole data set.
        transform: resizing happens here at most: images are made in its size.
        classes: names of the labels; label k is always drawn as ``SHAPES[k]``.
        masks: whether the target has ``masks``, too.

    Raises:
        DataError: if there are more classes than shapes.
    """

    def __init__(
        self,
        split: Split,
        length: int,
        seed: int,
        transform: DetectionTransform,
        classes: tuple[str, ...] = SHAPES[:2],
        *,
        masks: bool = False,
    ) -> None:
        if not 0 < len(classes) <= len(SHAPES):
            raise DataError(f"the synthetic source draws {len(SHAPES)} shapes: name 1 to {len(SHAPES)} classes")
        self.classes = classes
        super().__init__(split, length, seed)
        self._transform = transform
        self._masks = masks

    def __getitem__(self, index: int) -> Sample:
        rng = self._generator(index)
        pixels, boxes, labels = draw_shapes(rng, *self._transform.size, len(self.classes))
        corners = np.array(boxes, dtype=np.float32).reshape(-1, 4)
        known = np.array(labels, dtype=np.int64)
        masks = _masks_of(boxes, labels, *self._transform.size) if self._masks else None
        return detection_sample(index, torch.from_numpy(pixels), corners, known, self._transform, masks_GHW=masks)


def draw_shapes(
    rng: np.random.Generator, height: int, width: int, num_classes: int
) -> tuple[_Pixels, list[tuple[float, ...]], list[int]]:
    """One image.

    Returns:
        (3, height, width) pixels, corners as parts of width and height, and labels.
    """
    pixels = _background(rng, height, width)
    boxes: list[tuple[float, ...]] = []
    labels: list[int] = []
    if rng.random() < _EMPTY:
        return pixels, boxes, labels
    taken: list[tuple[int, int, int]] = []
    shortest = min(height, width)
    for _ in range(int(rng.integers(1, _MAX_SHAPES + 1))):
        side = int(rng.integers(shortest // 6, shortest // 2))
        x, y = int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1))
        label = int(rng.integers(num_classes))
        colour = np.clip(_COLOURS[label] + rng.integers(-35, 36, size=3), 0, 255).astype(np.uint8)
        if any(x < x0 + s and x0 < x + side and y < y0 + s and y0 < y + side for x0, y0, s in taken):
            continue  # no shape hides another
        taken.append((x, y, side))
        np.copyto(pixels[:, y : y + side, x : x + side], colour[:, None, None], where=_shape(label, side))
        boxes.append((x / width, y / height, (x + side) / width, (y + side) / height))
        labels.append(label)
    return pixels, boxes, labels


def _masks_of(boxes: list[tuple[float, ...]], labels: list[int], height: int, width: int) -> Tensor:
    """(G, height, width) bool: where ``draw_shapes`` has drawn."""
    masks_GHW = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for place, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        x, y, side = round(box[0] * width), round(box[1] * height), round((box[2] - box[0]) * width)
        masks_GHW[place, y : y + side, x : x + side] = torch.from_numpy(_shape(label, side))
    return masks_GHW


def _background(rng: np.random.Generator, height: int, width: int) -> _Pixels:
    """Coarse colour patches with fine grey noise on top."""
    patch = 16
    coarse = rng.integers(70, 160, size=(3, -(-height // patch), -(-width // patch)), dtype=np.uint8)
    pixels = coarse.repeat(patch, axis=1)[:, :height].repeat(patch, axis=2)[:, :, :width]
    grain = np.frombuffer(rng.bytes(height * width), dtype=np.uint8).reshape(height, width) >> 3
    return np.asarray(pixels + grain)


def _shape(label: int, side: int) -> NDArray[np.bool_]:
    """(side, side) mask that touches all four sides of its box."""
    if label == 1:
        return np.ones((side, side), dtype=np.bool_)
    centre: NDArray[Any] = np.arange(side) - (side - 1) / 2
    if label == 0:
        return np.asarray(centre[:, None] ** 2 + centre**2 <= (side / 2) ** 2)
    return np.asarray(np.abs(centre) * 2 <= np.arange(1, side + 1)[:, None])
