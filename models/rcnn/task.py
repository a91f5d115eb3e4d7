"""Faster R-CNN and Mask R-CNN of torchvision as a task: a thin adapter, no network is written again."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection as networks
from torchvision.models import get_model, list_models

from models.choices import check_choice
from models.data.pixels import IMAGENET
from models.detection.outputs import PADDING, DetectionOutputs, Detections
from models.detection.task import DetectionTask
from models.errors import TaskError
from models.options import Recipe, TaskOptions
from models.task import Batch, LossSum

__all__ = ["RCNNTask", "list_networks"]

_SIZE = (320, 320)
_MIN_SIDE = 64
_MASK = 0.5  # probability from which a pixel belongs to an object, as in torchvision's examples


def list_networks() -> list[str]:
    """Names of torchvision's networks that this task takes."""
    names: list[str] = list_models(module=networks, include=["fasterrcnn_*", "maskrcnn_*"])
    return names


class RCNNTask(DetectionTask):
    """Detectors in two stages; see ``DetectionTask``.

    Their losses are means over anchors and regions that were drawn in each image, so the sum over a microbatch is its
    loss x its images, and the weight is images. What is drawn comes from torch's global generator, which is seeded by
    step and microbatch (E3).

    Args:
        options: ``model`` is ``fasterrcnn_mobilenet_v3_large_320_fpn`` (the default) or another one of
            ``list_networks``. Mask R-CNN needs data with masks: ``synthetic`` or ``coco:PATH``.

    Raises:
        TaskError: if the model or the recipe does not exist, or the data has no masks.
        DataError: if ``--data`` is not understood or its folder is missing.
    """

    name = "rcnn"
    recipes: Mapping[str, Recipe] = {
        # torchvision's references/detection: 0.02 for 16 images, with a backbone's weights.
        "default": Recipe(
            batch_size=16,
            epochs=26,
            lr=0.01,
            momentum=0.9,
            weight_decay=1e-4,
            schedule="cosine",
            warmup_steps=100,
        ),
        # For --weights: small steps, and ten times as large ones for what is new.
        "finetune": Recipe(
            batch_size=16,
            epochs=10,
            lr=0.002,
            momentum=0.9,
            weight_decay=1e-4,
            schedule="cosine",
            warmup_steps=50,
            lr_factors=(("roi_heads.*_predictor.*", 10.0),),
        ),
    }

    def __init__(self, options: TaskOptions) -> None:
        self._network = options.model or "fasterrcnn_mobilenet_v3_large_320_fpn"
        check_choice("task rcnn has no model", self._network, list_networks())
        check_choice("rcnn has no recipe", options.recipe, self.recipes)
        size = options.image_size or _SIZE
        if min(size) < _MIN_SIDE:
            raise TaskError(f"image size {size[0]}x{size[1]} is below {_MIN_SIDE}: rcnn needs more")
        masks = self._network.startswith("maskrcnn")
        super().__init__(options, size=size, pixels=IMAGENET, augment="light", masks=masks)

    def build_model(self) -> nn.Module:
        """The network with random weights; images come to it as they are, since samples have one size already."""
        options: dict[str, Any] = {
            "weights": None,
            "weights_backbone": None,
            "num_classes": 1 + len(self.classes),
            "image_mean": [0.0, 0.0, 0.0],
            "image_std": [1.0, 1.0, 1.0],
            "_skip_resize": True,
        }
        network: nn.Module = get_model(self._network, **options)
        return network

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """All of the network's losses, as a sum over images."""
        targets = [self._target(batch, index) for index in range(len(batch))]
        losses: dict[str, Tensor] = model(list(batch.images), targets)
        total = torch.stack(list(losses.values())).sum() * len(batch)
        return LossSum(total, total.new_full((), len(batch), dtype=torch.float64))

    def _target(self, batch: Batch, index: int) -> dict[str, Tensor]:
        """Of one image, as torchvision wants it: corners in pixels, and 0 is background."""
        labels = batch.targets["labels"][index]
        real = labels != PADDING
        target = {"boxes": batch.targets["boxes"][index][real] * self._scale(batch), "labels": labels[real] + 1}
        if self._masks:
            target["masks"] = batch.targets["masks"][index][real].to(torch.uint8)
        return target

    def predict(self, model: nn.Module, batch: Batch) -> DetectionOutputs:
        """Objects of each image."""
        found = [self._found(row, batch) for row in model(list(batch.images))]
        return DetectionOutputs(found, None)

    def _found(self, row: Mapping[str, Tensor], batch: Batch) -> Detections:
        masks = row["masks"][:, 0] >= _MASK if self._masks else None
        return Detections(row["boxes"] / self._scale(batch), row["scores"], row["labels"] - 1, masks)

    @staticmethod
    def _scale(batch: Batch) -> Tensor:
        height, width = batch.images.shape[-2:]
        return torch.tensor([width, height, width, height], dtype=torch.float32, device=batch.images.device)

    @property
    def _asks_anchors(self) -> bool:
        return False
