"""From a decoded image to what a classifier takes, with or without random augmentation."""

from torch import Tensor
from torchvision.transforms import v2

from models.data.pixels import IMAGENET

__all__ = ["ClassificationTransform"]

_WHOLE = 256 / 224
"""How much larger a validation image is than the part in its middle that counts, as in torchvision's references."""


class ClassificationTransform:
    """Training: a random part of the image, flipped or not. Validation: its middle. Normalised as ImageNet is.

    Random numbers come from torch's global generator alone, which the caller seeds around each sample.

    Args:
        size: height and width in pixels of the result.
        augment: whether it is for training.
    """

    def __init__(self, size: tuple[int, int], *, augment: bool) -> None:
        self._size = size
        if augment:
            # At least a quarter of the image: a smaller part often shows nothing of a small picture's class.
            parts: list[v2.Transform] = [v2.RandomResizedCrop(size, scale=(0.25, 1.0), antialias=True)]
            self._parts = v2.Compose([*parts, v2.RandomHorizontalFlip()])
        else:
            whole = [round(side * _WHOLE) for side in size]
            self._parts = v2.Compose([v2.Resize(whole, antialias=True), v2.CenterCrop(size)])

    def __call__(self, image_3HW: Tensor) -> Tensor:
        """From (3, H, W) uint8 to (3, h, w) float32."""
        part: Tensor = self._parts(image_3HW)
        return IMAGENET.scale(part)
