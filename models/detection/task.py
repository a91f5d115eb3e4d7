"""What all tasks of object detection have in common: data, batches, the metric and pictures."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset

from models.choices import check_choice
from models.data.banana import BananaDetection, banana_classes
from models.data.coco_detection import CocoDetection, coco_classes
from models.data.detection_transforms import Augmentation, DetectionTransform
from models.data.images import DecodedImages
from models.data.pixels import Pixels
from models.data.spec import parse_data_spec
from models.data.synthetic_detection import SHAPES, SyntheticDetection
from models.data.voc_detection import VOCDetection, voc_classes
from models.detection.metric import DetectionMetric
from models.detection.outputs import PADDING, DetectionOutputs
from models.drawing import class_colour, draw_boxes, draw_masks
from models.errors import DataError, OnError, TaskError, raise_error
from models.options import TaskOptions
from models.task import Batch, Sample, Split

__all__ = ["DetectionTask"]

_DRAWN_SCORE = 0.3  # detections below it count for the metric, but clutter a picture
_WITH_MASKS = ("synthetic", "coco")


class DetectionTask(ABC):
    """All of ``models.task.Task``, ``Drawable`` and ``Showable`` but for the network.

    Args:
        options: what to learn from; see ``TaskOptions``.
        size: height and width in pixels of the images.
        pixels: how colours are scaled.
        augment: how training images are varied, if the options do not say.
        masks: whether each object has a mask, too.

    Raises:
        TaskError: if there is no such augmentation, or the data has no masks.
        DataError: if ``--data`` is not understood or its folder is missing.
    """

    name: str

    def __init__(
        self,
        options: TaskOptions,
        *,
        size: tuple[int, int],
        pixels: Pixels,
        augment: Augmentation,
        masks: bool = False,
    ) -> None:
        check_choice(f"task {self.name} has no --augment", options.augment or "none", get_args(Augmentation))
        self._options = options
        self._size = size
        self._pixels = pixels
        self._augment = augment
        self._masks = masks
        self._spec = parse_data_spec(options.data, ("synthetic", "banana", "voc", "coco"))
        if masks and self._spec.kind not in _WITH_MASKS:
            raise TaskError(f"--data {options.data} has no masks of objects: use one of {', '.join(_WITH_MASKS)}")
        self._decoded = DecodedImages(options.image_cache << 20)
        self._classes: tuple[str, ...] | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of their labels, without background; may read the data."""
        if self._classes is None:
            self._classes = self._read_classes(raise_error)
        return self._classes

    def _read_classes(self, on_error: OnError) -> tuple[str, ...]:
        if self._options.classes is not None:
            return self._options.classes
        if self._spec.kind == "synthetic":
            return SHAPES[:2]
        if self._spec.kind == "banana":
            return banana_classes(self._spec.path, on_error)
        if self._spec.kind == "coco":
            return coco_classes(self._spec.path, self._options.split_train)
        return voc_classes(self._spec.path, (self._options.split_train, self._options.split_val), on_error)

    def build_dataset(self, split: Split, on_error: OnError = raise_error) -> Dataset[Sample]:
        """Samples whose target is that of ``models.data.detection_sample``."""
        options, path = self._options, self._spec.path
        if on_error is not raise_error and self._classes is None:
            self._classes = self._read_classes(_ignore)  # the data set tells of it
        transform = self._transform(augment=split == "train")
        if self._spec.kind == "synthetic":
            length = options.synthetic_train if split == "train" else options.synthetic_val
            return SyntheticDetection(split, length, options.seed, transform, self.classes, masks=self._masks)
        if self._spec.kind == "banana":
            return BananaDetection(path, split, transform, self.classes, self._decoded, on_error)
        list_name = options.split_train if split == "train" else options.split_val
        if self._spec.kind == "coco":
            crowds = split == "val"
            return CocoDetection(
                path, list_name, transform, self.classes, self._decoded, on_error, crowds=crowds, masks=self._masks
            )
        return VOCDetection(path, list_name, transform, self.classes, self._decoded, on_error)

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
        targets = {
            "boxes": boxes_NG4,
            "labels": labels_NG,
            "difficult": difficult_NG,
            "size": torch.stack([sample.target["size"] for sample in samples]),
        }
        if self._masks:
            masks_NGHW = torch.zeros(len(samples), num_boxes, *self._size, dtype=torch.bool)
            for i, sample in enumerate(samples):
                masks_NGHW[i, : len(sample.target["labels"])] = sample.target["masks"]
            targets["masks"] = masks_NGHW
        ids = torch.tensor([sample.id for sample in samples], dtype=torch.int64)
        return Batch(torch.stack([sample.image for sample in samples]), targets, ids)

    def build_metric(self) -> DetectionMetric:
        """Average precision of the boxes, and d2l's errors where a network has anchors to ask."""
        return DetectionMetric(self.classes, anchors=self._asks_anchors)

    @property
    @abstractmethod
    def _asks_anchors(self) -> bool: ...

    def prepare(self, image: Tensor) -> Tensor:
        """From a decoded (3, H, W) uint8 image to the (3, h, w) float32 that the model takes."""
        return self._transform(augment=False)(image, torch.empty(0, 4)).image_3HW

    def draw(self, image: Tensor, outputs: DetectionOutputs, index: int) -> Tensor:
        """A copy of the (3, H, W) uint8 ``image`` with the boxes, classes and scores of prediction ``index``."""
        found = outputs.detections[index]
        clear = found.scores_D >= _DRAWN_SCORE
        labels, scores = found.labels_D[clear].tolist(), found.scores_D[clear].tolist()
        texts = [f"{self.classes[label]} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
        if found.masks_DHW is not None:
            image = _tinted(image, found.masks_DHW[clear], labels)
        return draw_boxes(image, found.boxes_D4[clear], texts, [class_colour(label) for label in labels])

    def restore(self, image: Tensor) -> Tensor:
        """The (3, h, w) uint8 picture of what the model gets."""
        return self._transform(augment=False).pixels.restore(image)

    def show(self, sample: Sample) -> Tensor:
        """Its boxes with their classes; a difficult one has a question mark."""
        image, target = self.restore(sample.image), sample.target
        labels, difficult = target["labels"].tolist(), target["difficult"].tolist()
        texts = [f"{self.classes[label]}{'?' * hard}" for label, hard in zip(labels, difficult, strict=True)]
        if self._masks:
            image = _tinted(image, target["masks"], labels)
        return draw_boxes(image, target["boxes"], texts, [class_colour(label) for label in labels])

    def count(self, sample: Sample) -> Mapping[str, int]:
        """Objects of each class."""
        return Counter(self.classes[label] for label in sample.target["labels"].tolist())

    def _transform(self, *, augment: bool) -> DetectionTransform:
        preset: Any = self._options.augment or self._augment
        return DetectionTransform(self._size, augment=preset if augment else "none", pixels=self._pixels)


def _tinted(image_3HW: Tensor, masks_DHW: Tensor, labels: Sequence[int]) -> Tensor:
    """The picture with each object in the colour of its class; the first one lies on top."""
    number_HW = torch.zeros(masks_DHW.shape[-2:], dtype=torch.int64)
    for place in reversed(range(len(labels))):
        number_HW[masks_DHW[place].cpu()] = place + 1
    if number_HW.shape != image_3HW.shape[-2:]:
        shape = list(image_3HW.shape[-2:])
        number_HW = torch.nn.functional.interpolate(number_HW[None, None].float(), shape, mode="nearest")[0, 0].long()
    return draw_masks(image_3HW, number_HW, [(0, 0, 0), *(class_colour(label) for label in labels)])


def _ignore(_: DataError) -> None: ...
