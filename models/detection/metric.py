"""How well a detector does on a validation set: average precision, and d2l's two errors."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from models.detection.average_precision import average_precision, eleven_point, judge
from models.detection.coco_metric import CocoImage, coco_average_precision
from models.detection.outputs import PADDING, DetectionOutputs
from models.task import Batch

__all__ = ["DetectionMetric"]


class _Image(NamedTuple):
    """What is kept of one image; arrays, since thousands of tensors would not travel between processes."""

    wrong: int
    absolute: float
    num_anchors: int
    boxes_D4: NDArray[np.float32]
    scores_D: NDArray[np.float32]
    labels_D: NDArray[np.int64]
    truth_G4: NDArray[np.float32]
    truth_labels_G: NDArray[np.int64]
    difficult_G: NDArray[np.bool_]
    size: tuple[int, int]
    """Height and width of its file, in pixels."""

    def in_pixels(self) -> CocoImage:
        """For COCO's metric."""
        height, width = self.size
        scale = np.array([width, height, width, height], dtype=np.float64)
        truth_G4, boxes_D4 = self.truth_G4 * scale, self.boxes_D4 * scale
        truth = (truth_G4, self.truth_labels_G, self.difficult_G)
        return CocoImage(width, height, *truth, boxes_D4, self.scores_D, self.labels_D)


class _Precision(NamedTuple):
    """Of one class."""

    every_point: float
    eleven_point: float


class DetectionMetric:
    """Implements ``models.task.Metric``; an image counts once, however often it is taken in.

    Args:
        classes: names of the classes, in the order of their labels.
        anchors: whether outputs tell of their anchors' errors.
    """

    def __init__(self, classes: Sequence[str], *, anchors: bool = True) -> None:
        self._classes = tuple(classes)
        self._anchors = anchors
        self._images: dict[int, _Image] = {}

    def update(self, outputs: DetectionOutputs, batch: Batch) -> None:
        """Take in the predictions for one batch that has ground truth."""
        assert (outputs.errors is not None) == self._anchors
        count = len(batch)
        wrong, absolute, num_anchors = [0] * count, [0.0] * count, 0
        if outputs.errors is not None:
            wrong, absolute = outputs.errors.wrong_N.tolist(), outputs.errors.absolute_N.tolist()
            num_anchors = outputs.errors.num_anchors
        truth, labels = _array(batch.targets["boxes"]), _array(batch.targets["labels"])
        difficult, sizes = _array(batch.targets["difficult"]), batch.targets["size"].tolist()
        for i, image_id in enumerate(batch.ids.tolist()):
            real = labels[i] != PADDING
            found = outputs.detections[i]
            self._images[image_id] = _Image(
                wrong=wrong[i],
                absolute=absolute[i],
                num_anchors=num_anchors,
                boxes_D4=_array(found.boxes_D4),
                scores_D=_array(found.scores_D),
                labels_D=_array(found.labels_D),
                truth_G4=truth[i][real],
                truth_labels_G=labels[i][real],
                difficult_G=difficult[i][real],
                size=(sizes[i][0], sizes[i][1]),
            )

    def merge(self, other: Self) -> None:
        """Take in the images that another worker has seen."""
        self._images.update(other._images)

    def compute(self) -> dict[str, float]:
        """The metrics, the same whatever the order of updates and merges.

        Returns:
            ``ap50``, the mean over classes with ground truth of the average precision at IoU >= 0.5 (VOC's rule since
            2010; boxes marked as difficult need not be found); ``ap50_11point``, that of VOC's rule until 2009;
            ``class_error``, the part of all anchors with the wrong class; ``box_mae``, the mean absolute error of
            offsets over 4 x all anchors, where those without a box count as 0 (both where outputs tell of anchors);
            with several classes ``ap50/NAME`` too. NaN where nothing was counted. With faster-coco-eval also what
            ``coco_average_precision`` gives.
        """
        images = [self._images[image_id] for image_id in sorted(self._images)]
        by_class = [self._precision(label, images) for label in range(len(self._classes))]
        anchors = sum(image.num_anchors for image in images)
        values = {
            "ap50": _mean(found.every_point for found in by_class),
            "ap50_11point": _mean(found.eleven_point for found in by_class),
        }
        if self._anchors:
            values["class_error"] = _ratio(sum(image.wrong for image in images), anchors)
            values["box_mae"] = _ratio(math.fsum(image.absolute for image in images), 4 * anchors)
        values |= coco_average_precision([image.in_pixels() for image in images], len(self._classes))
        if len(self._classes) > 1:
            values |= {f"ap50/{name}": found.every_point for name, found in zip(self._classes, by_class, strict=True)}
        return values

    @staticmethod
    def _precision(label: int, images: list[_Image]) -> _Precision:
        scores, true, num_boxes = [], [], 0
        for image in images:
            chosen, real = image.labels_D == label, image.truth_labels_G == label
            order = _order(image.scores_D[chosen], image.boxes_D4[chosen])
            found = judge(image.boxes_D4[chosen][order], image.truth_G4[real], image.difficult_G[real])
            num_boxes += int((~image.difficult_G[real]).sum())
            scores.append(image.scores_D[chosen][order][found.counted_D])
            true.append(found.true_D[found.counted_D])
        if num_boxes == 0:
            return _Precision(math.nan, math.nan)
        # Stable: equal scores stay in the order of image, then box.
        order = np.argsort(-np.concatenate(scores), kind="stable")
        ordered = np.concatenate(true)[order]
        return _Precision(average_precision(ordered, num_boxes), eleven_point(ordered, num_boxes))


def _order(scores_D: NDArray[np.float32], boxes_D4: NDArray[np.float32]) -> NDArray[np.intp]:
    """By score, best first, then by box."""
    return np.lexsort((*boxes_D4.T[::-1], -scores_D))


def _array(tensor: Tensor) -> NDArray[Any]:
    return tensor.detach().to("cpu", copy=True).numpy()


def _mean(values: Iterable[float]) -> float:
    """Over those that are a number."""
    known = [value for value in values if not math.isnan(value)]
    return _ratio(math.fsum(known), len(known))


def _ratio(numerator: float, denominator: int) -> float:
    return numerator / denominator if denominator else math.nan
