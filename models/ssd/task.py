"""Object detection as a task."""

from collections.abc import Mapping

from torch import Tensor, nn

from models.choices import check_choice
from models.data.pixels import RAW
from models.detection.outputs import DetectionOutputs
from models.detection.task import DetectionTask
from models.errors import TaskError
from models.options import Recipe, TaskOptions
from models.ssd.anchor_errors import anchor_errors
from models.ssd.detectors import DETECTORS
from models.ssd.matching import Targets
from models.task import Batch, LossSum

__all__ = ["SSDTask"]


class SSDTask(DetectionTask):
    """Single-shot detectors; see ``DetectionTask``.

    Args:
        options: what to learn from; see ``TaskOptions``.

    Raises:
        TaskError: if the model, the recipe or the image size does not exist or fit.
        DataError: if ``--data`` is not understood or its folder is missing.
    """

    name = "ssd"

    def __init__(self, options: TaskOptions) -> None:
        name = options.model or "tinyssd"
        check_choice("task ssd has no model", name, DETECTORS)
        self._detector = DETECTORS[name]
        self.recipes: Mapping[str, Recipe] = self._detector.recipes
        check_choice(f"{name} has no recipe", options.recipe, self.recipes)
        size = options.image_size or self._detector.image_size
        if self._detector.fixed and size != self._detector.image_size:
            raise TaskError(
                "--image-size {}x{}: {name} takes images of {}x{} alone".format(
                    *size, *self._detector.image_size, name=name
                )
            )
        if min(size) < self._detector.min_side:
            least = self._detector.min_side
            raise TaskError(f"image size {size[0]}x{size[1]} is below {least}: {name} needs more")
        d2l = options.recipe == "d2l"
        super().__init__(
            options,
            size=size,
            pixels=RAW if d2l else self._detector.pixels,
            augment="none" if d2l else self._detector.augment,
        )

    def build_model(self) -> nn.Module:
        """The network with random weights."""
        return self._detector.build(len(self.classes))

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """The network's own loss, as a sum."""
        targets = self._targets(batch)  # before the forward pass: a device then has the whole of it queued
        scores_NAK, offsets_NA4 = model(batch.images)
        return self._detector.loss(scores_NAK, offsets_NA4, targets)

    def predict(self, model: nn.Module, batch: Batch) -> DetectionOutputs:
        """Detections of each image; with ground truth in the batch also the errors of its anchors."""
        scores_NAK, offsets_NA4 = model(batch.images)
        found = self._detector.detect(self._anchors(batch), scores_NAK, offsets_NA4)
        if "boxes" not in batch.targets:
            return DetectionOutputs(found, None)
        return DetectionOutputs(found, anchor_errors(scores_NAK, offsets_NA4, self._targets(batch)))

    @property
    def _asks_anchors(self) -> bool:
        return True

    def _anchors(self, batch: Batch) -> Tensor:
        height, width = batch.images.shape[-2:]
        return self._detector.anchors(height, width, batch.images.device)

    def _targets(self, batch: Batch) -> Targets:
        return self._detector.targets(self._anchors(batch), batch.targets["boxes"], batch.targets["labels"])
