"""How colours are scaled before a network sees them."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

__all__ = ["CAFFE", "IMAGENET", "RAW", "Pixels"]


class Pixels(NamedTuple):
    """Mean and deviation of red, green and blue, in units of 0..255."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def scale(self, image_3HW: Tensor) -> Tensor:
        """From (3, H, W) in 0..255 to float32; a float image is changed in place."""
        image = image_3HW.float()
        return image if self == RAW else TF.normalize(image, list(self.mean), list(self.std), inplace=True)

    def restore(self, image_3HW: Tensor) -> Tensor:
        """Back from what ``scale`` gave to (3, H, W) uint8, for who looks at it."""
        mean, std = (torch.tensor(part).view(3, 1, 1) for part in self)
        return (image_3HW.cpu() * std + mean).round().clamp(0, 255).to(torch.uint8)


def _of_unit(mean: tuple[float, ...], std: tuple[float, ...]) -> Pixels:
    red, green, blue = (255 * part for part in mean)
    return Pixels((red, green, blue), (255 * std[0], 255 * std[1], 255 * std[2]))


IMAGENET = _of_unit((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""What torchvision's classification networks were trained on."""
CAFFE = _of_unit((0.48235, 0.45882, 0.40784), (1 / 255, 1 / 255, 1 / 255))
"""The VGG16 of SSD's authors: only the mean is taken off, as in torchvision's ``ssd300_vgg16``."""
RAW = Pixels((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
"""Pixels as they are, as in d2l."""
