"""From a decoded image and its boxes to what a detector takes, with or without random augmentation."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF

from models.data.pixels import Pixels

__all__ = ["Augmentation", "DetectionTransform", "Transformed"]

Augmentation = Literal["none", "light", "ssd"]

_GREY = (0.299, 0.587, 0.114)  # ITU-R 601, as in torchvision's adjust_saturation
_JITTER = 0.2  # brightness, contrast and saturation are multiplied by 1 - 0.2 .. 1 + 0.2


class Transformed(NamedTuple):
    """An image with its boxes."""

    image_3HW: Tensor
    """(3, h, w) float32."""
    boxes_G4: Tensor
    """(G, 4) float32 corners as parts of width and height."""
    kept_G: Tensor
    """(G,) int64: which of the boxes given are still in the image."""
    masks_GHW: Tensor | None = None
    """(G, h, w) bool: where each object is, if that was given."""


class DetectionTransform:
    """Resizes, augments and scales; draws from torch's global generator alone (E3).

    Args:
        size: height and width in pixels of the result.
        augment: ``none``; ``light``: flip half of the images and vary their colours; ``ssd``: that of SSD's authors,
            stronger colours, zooming out, and crops that overlap an object by at least so much.
        pixels: how colours are scaled.
    """

    def __init__(self, size: tuple[int, int], *, augment: Augmentation, pixels: Pixels) -> None:
        self.size = size
        self.augment = augment
        self.pixels = pixels
        fill = {tv_tensors.Image: [round(part) for part in pixels.mean], tv_tensors.Mask: 0}
        self._ssd = v2.Compose(
            [
                v2.RandomPhotometricDistort(),
                v2.RandomZoomOut(fill=fill),
                v2.RandomIoUCrop(),
                v2.RandomHorizontalFlip(),
                v2.Resize(size, antialias=True),
                v2.SanitizeBoundingBoxes(labels_getter=_index_of),
            ]
        )

    def __call__(self, image_3HW: Tensor, boxes_G4: Tensor, masks_GHW: Tensor | None = None) -> Transformed:
        """One image with its boxes.

        Args:
            image_3HW: (3, H, W) uint8.
            boxes_G4: (G, 4) float32 corners as parts of width and height.
            masks_GHW: (G, H, W) bool, one for each box, or None.
        """
        kept_G = torch.arange(len(boxes_G4))
        if self.augment == "ssd":
            image_3HW, boxes_G4, kept_G, masks_GHW = self._as_in_ssd(image_3HW, boxes_G4, kept_G, masks_GHW)
        if tuple(image_3HW.shape[-2:]) != self.size:
            image_3HW = TF.resize(image_3HW, list(self.size), antialias=True)
        if masks_GHW is not None and tuple(masks_GHW.shape[-2:]) != self.size:
            masks_GHW = TF.resize(masks_GHW.to(torch.uint8), list(self.size), InterpolationMode.NEAREST).bool()
        image = image_3HW.float()
        if self.augment == "light":
            # Always four draws, so that one sample's colours do not depend on whether it was flipped.
            flip, *draws = torch.rand(4).tolist()
            image = _jitter(image, *(1.0 + _JITTER * (2.0 * draw - 1.0) for draw in draws))
            if flip < 0.5:
                x1, y1, x2, y2 = boxes_G4.unbind(dim=1)
                image, boxes_G4 = TF.horizontal_flip(image), torch.stack((1 - x2, y1, 1 - x1, y2), dim=1)
                masks_GHW = None if masks_GHW is None else masks_GHW.flip(-1)
        return Transformed(self.pixels.scale(image), boxes_G4, kept_G, masks_GHW)

    def _as_in_ssd(
        self, image_3HW: Tensor, boxes_G4: Tensor, index_G: Tensor, masks_GHW: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        height, width = image_3HW.shape[-2:]
        corners_G4 = boxes_G4 * torch.tensor([width, height, width, height])
        boxes = tv_tensors.BoundingBoxes(corners_G4, format="XYXY", canvas_size=(height, width))
        content = {"image": tv_tensors.Image(image_3HW), "boxes": boxes, "index": index_G}
        if masks_GHW is not None:
            content["masks"] = tv_tensors.Mask(masks_GHW)
        found = self._ssd(content)
        height, width = self.size
        unit_G4 = found["boxes"].as_subclass(Tensor).float() / torch.tensor([width, height, width, height])
        masks_GHW = found["masks"].as_subclass(Tensor) if masks_GHW is not None else None
        return found["image"].as_subclass(Tensor), unit_G4, found["index"], masks_GHW


def _index_of(content: dict[str, Tensor]) -> Tensor:
    return content["index"]


def _jitter(image_3HW: Tensor, brightness: float, contrast: float, saturation: float) -> Tensor:
    """Saturation, contrast, then brightness, as torchvision's ``adjust_…`` but for clipping.

    All three are linear in the colours of a pixel: one pass over the image instead of a dozen, at a fifth of the time.
    """
    pixels_3P = image_3HW.flatten(1)
    grey_3 = torch.tensor(_GREY)
    mean = grey_3 @ pixels_3P.mean(dim=1)
    matrix_33 = brightness * contrast * (saturation * torch.eye(3) + (1 - saturation) * grey_3.expand(3, 3))
    bias_31 = (brightness * (1 - contrast) * mean).expand(3, 1)
    return torch.addmm(bias_31, matrix_33, pixels_3P).view_as(image_3HW)
