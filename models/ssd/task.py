"""Object detection with TinySSD as a task."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.utils import draw_bounding_boxes

from models.data.banana import BananaDetection, banana_classes
from models.data.detection_transforms import DetectionTransform
from models.data.spec import parse_data_spec
from models.data.synthetic_detection import SHAPES, SyntheticDetection
from models.data.voc_detection import VOCDetection, voc_classes
from models.errors import TaskError
from models.options import Recipe, TaskOptions
from models.ssd.anchors import MIN_IMAGE_SIDE, anchors
from models.ssd.detect import detect
from models.ssd.loss import ssd_loss
from models.ssd.matching import PADDING, Targets, build_targets
from models.ssd.metric import DetectionMetric, DetectionOutputs, anchor_errors
from models.ssd.network import TinySSD
from models.task import Batch, LossSum, Sample, Split

__all__ = ["SSDTask"]

_MODELS = ("tinyssd",)
_IMAGE_SIZE = (256, 256)
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
    recipes: Mapping[str, Recipe] = {
        "default": Recipe(
            batch_size=32,
            epochs=20,
            lr=0.05,
            momentum=0.9,
            weight_decay=5e-4,
            schedule="cosine",
            warmup_steps=50,
        ),
        # "Dive into Deep Learning", section 14.7: plain SGD on pixels of 0..255, no augmentation.
        "d2l": Recipe(batch_size=32, epochs=20, lr=0.2, weight_decay=5e-4),
    }

    def __init__(self, options: TaskOptions) -> None:
        if options.model not in (None, *_MODELS):
            raise TaskError(f"task ssd has no model {options.model!r}: use one of {', '.join(_MODELS)}")
        if options.recipe not in self.recipes:
            raise TaskError(f"task ssd has no recipe {options.recipe!r}: use one of {', '.join(self.recipes)}")
        self._size = options.image_size or _IMAGE_SIZE
        if min(self._size) < MIN_IMAGE_SIDE:
            raise TaskError(f"image size {self._size[0]}x{self._size[1]} is below {MIN_IMAGE_SIDE}: TinySSD needs more")
        self._options = options
        self._spec = parse_data_spec(options.data)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of their labels, without background; may read the data."""
        if self._options.classes is not None:
            return self._options.classes
        if self._spec.kind == "synthetic":
            return SHAPES[:2]
        if self._spec.kind == "banana":
            return banana_classes(self._spec.path)
        return voc_classes(self._spec.path, (self._options.split_train, self._options.split_val))

    def build_model(self) -> nn.Module:
        """TinySSD with PyTorch's own initial weights, as in d2l."""
        return TinySSD(len(self.classes))

    def build_dataset(self, split: Split) -> Dataset[Sample]:
        """Samples with ``boxes``, (G, 4) float32 corners as parts of width and height, and ``labels``, (G,) int64."""
        options, path = self._options, self._spec.path
        transform = self._transform(augment=split == "train" and options.recipe != "d2l")
        if self._spec.kind == "synthetic":
            length = options.synthetic_train if split == "train" else options.synthetic_val
            return SyntheticDetection(split, length, options.seed, transform, self.classes)
        if self._spec.kind == "banana":
            return BananaDetection(path, split, transform, self.classes)
        list_name = options.split_train if split == "train" else options.split_val
        return VOCDetection(path, list_name, transform, self.classes)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Boxes are filled up to the largest number in the batch, which may be 0, with rows of label ``PADDING``."""
        num_boxes = max(len(sample.target["labels"]) for sample in samples)
        boxes_NG4 = torch.zeros(len(samples), num_boxes, 4)
        labels_NG = torch.full((len(samples), num_boxes), PADDING, dtype=torch.int64)
        for i, sample in enumerate(samples):
            count = len(sample.target["labels"])
            boxes_NG4[i, :count] = sample.target["boxes"]
            labels_NG[i, :count] = sample.target["labels"]
        return Batch(
            images=torch.stack([sample.image for sample in samples]),
            targets={"boxes": boxes_NG4, "labels": labels_NG},
            ids=torch.tensor([sample.id for sample in samples], dtype=torch.int64),
        )

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """d2l's loss, summed over images; the weight is their number."""
        targets = _targets(batch)  # before the forward pass: a device then has the whole of it queued
        scores_NAK, offsets_NA4 = model(batch.images)
        return ssd_loss(scores_NAK, offsets_NA4, targets)

    def predict(self, model: nn.Module, batch: Batch) -> DetectionOutputs:
        """Detections of each image; with ground truth in the batch also the errors of its anchors."""
        scores_NAK, offsets_NA4 = model(batch.images)
        found = detect(_anchors(batch), scores_NAK, offsets_NA4)
        if "boxes" not in batch.targets:
            return DetectionOutputs(found, None)
        return DetectionOutputs(found, anchor_errors(scores_NAK, offsets_NA4, _targets(batch)))

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
        return DetectionTransform(self._size, augment=augment, normalise=self._options.recipe != "d2l")


def _anchors(batch: Batch) -> Tensor:
    height, width = batch.images.shape[-2:]
    return anchors(height, width, batch.images.device)


def _targets(batch: Batch) -> Targets:
    return build_targets(_anchors(batch), batch.targets["boxes"], batch.targets["labels"])
