"""The networks of the task ssd by name, with what belongs to each: boxes, matching, loss, pixels and recipes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from models.data.detection_transforms import Augmentation
from models.data.pixels import CAFFE, IMAGENET, Pixels
from models.detection.outputs import Detections
from models.options import Recipe
from models.ssd.anchors import MIN_IMAGE_SIDE, anchors
from models.ssd.detect import detect, detect_by_class
from models.ssd.loss import ssd_loss
from models.ssd.matching import Targets, build_targets
from models.ssd.multibox import match_targets, multibox_loss
from models.ssd.network import TinySSD
from models.ssd.ssd300 import SIZE, default_boxes, ssd300_resnet50, ssd300_vgg16
from models.task import LossSum

__all__ = ["DETECTORS", "Detector"]


@dataclass(frozen=True, kw_only=True)
class Detector:
    """One network and its surroundings."""

    build: Callable[[int], nn.Module]
    """From the number of classes without background; gives scores (N, A, K + 1) and offsets (N, A, 4)."""
    anchors: Callable[[int, int, torch.device], Tensor]
    """(A, 4) corners for an image's height and width."""
    targets: Callable[[Tensor, Tensor, Tensor], Targets]
    """From anchors, ground truth boxes and labels."""
    loss: Callable[[Tensor, Tensor, Targets], LossSum]
    """From scores, offsets and targets."""
    detect: Callable[[Tensor, Tensor, Tensor], list[Detections]]
    """From anchors, scores and offsets."""
    image_size: tuple[int, int]
    """Height and width that it is made for."""
    fixed: bool
    """Whether it takes that size alone."""
    min_side: int
    """Least height and width of an image."""
    pixels: Pixels
    """How its input is scaled."""
    augment: Augmentation
    """How training images are varied by default."""
    recipes: Mapping[str, Recipe]


_TINY = Recipe(batch_size=32, epochs=20, lr=0.05, momentum=0.9, weight_decay=5e-4, schedule="cosine", warmup_steps=50)
_LARGE = Recipe(
    # torchvision's and NVIDIA's references have lr 0.002 to 0.0026 for 32 images, with weights from ImageNet.
    batch_size=32,
    epochs=120,
    lr=0.002,
    momentum=0.9,
    weight_decay=5e-4,
    schedule="cosine",
    warmup_steps=100,
)

# For --weights: small steps, and ten times as large ones for the heads.
_FINE = replace(_LARGE, epochs=30, lr=0.001, lr_factors=(("head.*", 10.0),))


def _ssd300(build: Callable[[int], nn.Module], pixels: Pixels) -> Detector:
    return Detector(
        build=build,
        anchors=default_boxes,
        targets=match_targets,
        loss=multibox_loss,
        detect=detect_by_class,
        image_size=(SIZE, SIZE),
        fixed=True,
        min_side=SIZE,
        pixels=pixels,
        augment="ssd",
        recipes={"default": _LARGE, "finetune": _FINE},
    )


DETECTORS: Mapping[str, Detector] = {
    "tinyssd": Detector(
        build=TinySSD,
        anchors=anchors,
        targets=build_targets,
        loss=ssd_loss,
        detect=detect,
        image_size=(256, 256),
        fixed=False,
        min_side=MIN_IMAGE_SIDE,
        pixels=IMAGENET,
        augment="light",
        # d2l, "Dive into Deep Learning", section 14.7: plain SGD on pixels of 0..255, no augmentation.
        recipes={"default": _TINY, "d2l": Recipe(batch_size=32, epochs=20, lr=0.2, weight_decay=5e-4)},
    ),
    "ssd300_vgg16": _ssd300(ssd300_vgg16, CAFFE),
    "ssd300_resnet50": _ssd300(ssd300_resnet50, IMAGENET),
}
