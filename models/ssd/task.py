"""Object detection as a task."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.utils import draw_bounding_boxes

from models.choices import check_choice
from models.data.banana import BananaDetection, banana_classes
from models.data.coco_detection import CocoDetection, coco_classes
from models.data.detection_transforms import Augmentation, DetectionTransform
from models.data.images import DecodedImages
from models.data.pixels import RAW
from models.data.spec import parse_data_spec
from models.data.synthetic_detection import SHAPES, SyntheticDetection
from models.data.voc_detection import VOCDetection, voc_classes
from models.errors import TaskError
from models.options import Recipe, TaskOptions
from models.ssd.detectors import DETECTORS
from models.ssd.matching import PADDING, Targets
from models.ssd.metric import DetectionMetric, DetectionOutputs, anchor_errors
from models.task import Batch, LossSum, Sample, Split

__all__ = ["SSDTask"]

_DRAWN_SCORE = 0.3  # detections below it count for the metric, but clutter a picture


class SSDTask:
    """Implements ``models.task.Task`` and ``Drawable``.

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
        self._size = options.image_size or self._detector.image_size
        if self._detector.fixed and self._size != self._detector.image_size:
            raise TaskError(
                "--image-size {}x{}: {name} takes images of {}x{} alone".format(
                    *self._size, *self._detector.image_size, name=name
                )
            )
        if min(self._size) < self._detector.min_side:
            least = self._detector.min_side
            raise TaskError(f"image size {self._size[0]}x{self._size[1]} is below {least}: {name} needs more")
        check_choice("task ssd has no --augment", options.augment or "none", get_args(Augmentation))
        self._options = options
        self._spec = parse_data_spec(options.data, ("synthetic", "banana", "voc", "coco"))
        self._decoded = DecodedImages(options.image_cache << 20)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of their labels, without background; may read the data."""
        if self._options.classes is not None:
            return self._options.classes
        if self._spec.kind == "synthetic":
            return SHAPES[:2]
        if self._spec.kind == "banana":
            return banana_classes(self._spec.path)
        if self._spec.kind == "coco":
            return coco_classes(self._spec.path, self._options.split_train)
        return voc_classes(self._spec.path, (self._options.split_train, self._options.split_val))

    def build_model(self) -> nn.Module:
        """The network with random weights."""
        return self._detector.build(len(self.classes))

    def build_dataset(self, split: Split) -> Dataset[Sample]:
        """Samples whose target is that of ``models.data.detection_sample``."""
        options, path = self._options, self._spec.path
        transform = self._transform(augment=split == "train")
        if self._spec.kind == "synthetic":
            length = options.synthetic_train if split == "train" else options.synthetic_val
            return SyntheticDetection(split, length, options.seed, transform, self.classes)
        if self._spec.kind == "banana":
            return BananaDetection(path, split, transform, self.classes, self._decoded)
        list_name = options.split_train if split == "train" else options.split_val
        if self._spec.kind == "coco":
            return CocoDetection(path, list_name, transform, self.classes, self._decoded, crowds=split == "val")
        return VOCDetection(path, list_name, transform, self.classes, self._decoded)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Boxes are filled up to the largest number in the batch, which may be 0, with rows of label ``PADDING``."""
        num_boxes = max(len(sample.target["labels"]) for sample in samples)
        boxes_NG4 = torch.zeros(len(samples), num_boxes, 4)
        labels_NG = torch.full((len(samples), num_boxes), PADDING, dtype=torch.int64)
        difficult_NG = torch.zeros(len(samples), num_boxes, dtype=torch.bool)
        for i, sample in enumerate(samples):
            count = len(sample.target["labels"])
            boxes_NG4[i, :count] = sample.target["boxes"]
            labels_NG[i, :count] = sample.target["labels"]
            difficult_NG[i, :count] = sample.target["difficult"]
        return Batch(
            images=torch.stack([sample.image for sample in samples]),
            targets={
                "boxes": boxes_NG4,
                "labels": labels_NG,
                "difficult": difficult_NG,
                "size": torch.stack([sample.target["size"] for sample in samples]),
            },
            ids=torch.tensor([sample.id for sample in samples], dtype=torch.int64),
        )

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

    def build_metric(self) -> DetectionMetric:
        """Average precision and d2l's errors."""
        return DetectionMetric(self.classes)

    def prepare(self, image: Tensor) -> Tensor:
        """From a decoded (3, H, W) uint8 image to the (3, h, w) float32 that the model takes."""
        return self._transform(augment=False)(image, torch.empty(0, 4))[0]

    def draw(self, image: Tensor, outputs: DetectionOutputs, index: int) -> Tensor:
        """A copy of the (3, H, W) uint8 ``image`` with the boxes, classes and scores of prediction ``index``."""
        found = outputs.detections[index]
        clear = found.scores_D >= _DRAWN_SCORE
        if not clear.any():
            return image.clone()
        height, width = image.shape[-2:]
        corners = found.boxes_D4[clear].cpu().clamp(0, 1) * torch.tensor([width, height, width, height])
        pairs = zip(found.labels_D[clear].tolist(), found.scores_D[clear].tolist(), strict=True)
        texts = [f"{self.classes[label]} {score:.2f}" for label, score in pairs]
        drawn: Tensor = draw_bounding_boxes(image, corners, labels=texts, colors="red", width=2)
        return drawn

    def _transform(self, *, augment: bool) -> DetectionTransform:
        d2l = self._options.recipe == "d2l"
        preset: Any = self._options.augment or ("none" if d2l else self._detector.augment)
        pixels = RAW if d2l else self._detector.pixels
        return DetectionTransform(self._size, augment=preset if augment else "none", pixels=pixels)

    def _anchors(self, batch: Batch) -> Tensor:
        height, width = batch.images.shape[-2:]
        return self._detector.anchors(height, width, batch.images.device)

    def _targets(self, batch: Batch) -> Targets:
        return self._detector.targets(self._anchors(batch), batch.targets["boxes"], batch.targets["labels"])
