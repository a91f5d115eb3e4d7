"""The boxes that TinySSD starts from: four at every position of five feature maps."""

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["ANCHORS_PER_POSITION", "MIN_IMAGE_SIDE", "RATIOS", "SIZES", "anchors", "feature_maps", "prior_boxes"]

SIZES = ((0.2, 0.272), (0.37, 0.447), (0.54, 0.619), (0.71, 0.79), (0.88, 0.961))
"""Scales of the anchors of each feature map, as parts of the image."""
RATIOS = ((1.0, 2.0, 0.5),) * 5
"""Ratios of width to height of the anchors of each feature map."""
ANCHORS_PER_POSITION = 4
"""Both sizes at the first ratio, and the first size at both other ratios."""
MIN_IMAGE_SIDE = 64
"""Below it the last feature map would be empty: the blocks halve an image six times."""


@lru_cache(maxsize=16)
def anchors(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Anchors of an image of ``height`` x ``width`` pixels, in the order of TinySSD's predictions.

    Not a buffer of the network: they depend on the image's size alone, and a buffer would travel and be checkpointed.
    The result is shared by all callers, and must not be written to.

    Args:
        height: of the network's input, in pixels, at least ``MIN_IMAGE_SIDE``.
        width: of the network's input, in pixels, at least ``MIN_IMAGE_SIDE``.
        device: where the result lies; None means the CPU.

    Returns:
        (A, 4) float32 corners x1, y1, x2, y2 as parts of width and height; they may reach outside of 0..1.
    """
    with torch.inference_mode(False):  # what is cached must be usable in training, whoever asked for it first
        parts = [
            prior_boxes(h, w, sizes, ratios)
            for (h, w), sizes, ratios in zip(feature_maps(height, width), SIZES, RATIOS, strict=True)
        ]
        return torch.cat(parts).to(device)  # computed on the CPU, so that every device has the same bits


def feature_maps(height: int, width: int) -> list[tuple[int, int]]:
    """Heights and widths of the feature maps that TinySSD predicts from."""
    return [*((height // stride, width // stride) for stride in (8, 16, 32, 64)), (1, 1)]


def prior_boxes(height: int, width: int, sizes: tuple[float, ...], ratios: tuple[float, ...]) -> Tensor:
    """Anchors around the centres of a feature map's positions: d2l's ``multibox_prior``, to the bit.

    An anchor of size s and ratio r is ``s * sqrt(r) * height / width`` wide and ``s / sqrt(r)`` high, so that ratio 1
    is a square in pixels. As in d2l, height and width are the feature map's.

    Returns:
        (height * width * (len(sizes) + len(ratios) - 1), 4) float32: position by position, row by row; at a position
        first every size with the first ratio, then the first size with the other ratios.
    """
    sizes_S = torch.tensor(sizes)
    roots_R = torch.sqrt(torch.tensor(ratios))
    widths_K = torch.cat((sizes_S * roots_R[0], sizes[0] * roots_R[1:])) * height / width
    heights_K = torch.cat((sizes_S / roots_R[0], sizes[0] / roots_R[1:]))
    corners_K4 = torch.stack((-widths_K, -heights_K, widths_K, heights_K), dim=1) / 2
    y_HW, x_HW = torch.meshgrid(
        (torch.arange(height) + 0.5) * (1.0 / height),
        (torch.arange(width) + 0.5) * (1.0 / width),
        indexing="ij",
    )
    centres_P4 = torch.stack((x_HW, y_HW, x_HW, y_HW), dim=-1).reshape(-1, 4)
    return (centres_P4[:, None] + corners_K4).reshape(-1, 4)
