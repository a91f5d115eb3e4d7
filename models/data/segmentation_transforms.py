"""What is done to an image and its mask between the file and the network."""

from typing import Any, Literal

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from models.data.voc_classes import VOID
from models.task import Split

__all__ = ["Augmentation", "SegmentationTransform", "normalise"]

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


Augmentation = Literal["none", "crop", "scale"]


class _PadToSize(v2.Transform):  # type: ignore[misc]  # torchvision has no types
    """Pad at the bottom and right what is smaller."""

    def __init__(self, size: tuple[int, int], fill: Any) -> None:
        super().__init__()
        self._size = size
        self._fill = fill

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """From an image or mask to one of at least that size."""
        height, width = inpt.shape[-2:]
        border = [0, 0, max(0, self._size[1] - width), max(0, self._size[0] - height)]
        return v2.functional.pad(inpt, border, fill=self._fill[type(inpt)])


class SegmentationTransform:
    """Training: random crop and horizontal flip, scaled before if asked for; validation: the whole image as it is.

    Both are normalised.

    Random numbers come from torch's global generator alone, which the caller seeds around each sample. An image smaller
    than the crop is padded, with the mean colour and with void in the mask, and never dropped.

    Args:
        split: ``train`` or ``val``.
        crop_size: height and width in pixels of a training image.
        flip: whether training images are flipped, every other one.
        augment: ``crop``; ``scale``: from half to twice the size first, as in torchvision's references; ``none``: the
            middle of the image.
    """

    def __init__(
        self, split: Split, crop_size: tuple[int, int], *, flip: bool = True, augment: Augmentation = "crop"
    ) -> None:
        # The mean colour becomes (almost) zero, which is also what convolutions pad with.
        fill = {tv_tensors.Image: [round(255 * mean) for mean in _MEAN], tv_tensors.Mask: VOID}
        steps: list[v2.Transform] = [v2.RandomCrop(crop_size, pad_if_needed=True, fill=fill)]
        if augment == "none":
            # Padded first: a centre crop itself would fill a mask with 0.
            steps = [_PadToSize(crop_size, fill), v2.CenterCrop(crop_size)]
        elif flip:
            steps.append(v2.RandomHorizontalFlip())
        if augment == "scale":
            steps.insert(0, v2.ScaleJitter(crop_size, scale_range=(0.5, 2.0), antialias=True))
        self._augment = v2.Compose(steps) if split == "train" else None

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """From a (3, H, W) uint8 image and its (H, W) uint8 mask to what a ``Sample`` holds.

        Returns:
            The (3, h, w) float32 image and ``{"mask": (h, w) uint8}``.
        """
        if self._augment is not None:
            # Cropped as bytes: a quarter of the memory, and the whole picture is never converted.
            image, mask = self._augment(tv_tensors.Image(image), tv_tensors.Mask(mask))
        mask = mask.as_subclass(Tensor).contiguous()
        return normalise(image.as_subclass(Tensor)), {"mask": mask}


def normalise(image: Tensor) -> Tensor:
    """From (3, H, W) uint8 to float32, scaled to 0..1 and normalised with ImageNet's mean and standard deviation."""
    mean, std = 255 * torch.tensor(_MEAN).view(3, 1, 1), 255 * torch.tensor(_STD).view(3, 1, 1)
    return image.to(torch.float32).sub_(mean).div_(std)
