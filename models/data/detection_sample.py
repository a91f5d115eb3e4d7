"""What all detection data sets hand out."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.data.detection_transforms import DetectionTransform
from models.task import Sample

__all__ = ["detection_sample"]


def detection_sample(
    index: int,
    image_3HW: Tensor,
    boxes: NDArray[np.float32],
    labels: NDArray[np.int64],
    transform: DetectionTransform,
    difficult: NDArray[np.bool_] | None = None,
    masks_GHW: Tensor | None = None,
) -> Sample:
    """Transform an image with its boxes.

    Args:
        index: of the sample in its split.
        image_3HW: decoded, uint8.
        boxes: (G, 4) corners as parts of width and height.
        labels: (G,) classes from 0.
        transform: of the split.
        difficult: (G,) objects that a metric does not ask for; None: it asks for all.
        masks_GHW: (G, H, W) bool, where each object is; None: nobody asks.

    Returns:
        A sample whose target has ``boxes``, ``labels``, ``difficult``, and ``size``, (2,) int64: height and width of
        the image in its file; and ``masks``, (G, h, w) bool, if they were given.
    """
    image, boxes_G4, kept_G, masks_GHW = transform(image_3HW, torch.from_numpy(boxes.copy()), masks_GHW)
    difficult_G = torch.zeros(len(labels), dtype=torch.bool) if difficult is None else torch.from_numpy(difficult)
    target = {
        "boxes": boxes_G4,
        "labels": torch.from_numpy(labels)[kept_G],
        "difficult": difficult_G[kept_G],
        "size": torch.tensor(image_3HW.shape[-2:]),
    }
    if masks_GHW is not None:
        target["masks"] = masks_GHW
    return Sample(image, target, index)
