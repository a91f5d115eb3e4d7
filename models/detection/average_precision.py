"""Average precision of one class by VOC's rules."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Verdicts", "average_precision", "eleven_point", "judge"]

_Floats = NDArray[np.floating[Any]]


def average_precision(true_D: NDArray[np.bool_], num_boxes: int) -> float:
    """Area under the precision-recall curve, precision made non-increasing from the right: VOC's rule since 2010.

    Args:
        true_D: for each detection, best first, whether it found a box.
        num_boxes: number of ground truth boxes.

    Returns:
        0..1; NaN without ground truth.
    """
    if num_boxes == 0:
        return float("nan")
    _, precision_D = _found_and_precision(true_D)
    envelope_D = np.maximum.accumulate(precision_D[::-1])[::-1]
    # Recall rises by 1 / num_boxes at each true positive, and stays between them.
    return float(envelope_D[true_D].sum() / num_boxes)


def eleven_point(true_D: NDArray[np.bool_], num_boxes: int) -> float:
    """Mean over recalls of 0, 0.1, …, 1 of the best precision at that recall or a larger one: VOC's rule until 2009.

    Args:
        true_D: for each detection, best first, whether it found a box.
        num_boxes: number of ground truth boxes.

    Returns:
        0..1; NaN without ground truth.
    """
    if num_boxes == 0:
        return float("nan")
    found_D, precision_D = _found_and_precision(true_D)
    # In whole boxes: 0.1 * 3 is more than 0.3.
    best = [max(precision_D[10 * found_D >= tenth * num_boxes], default=0.0) for tenth in range(11)]
    return float(sum(best) / 11)


def _found_and_precision(true_D: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Boxes found so far, and their part of the detections so far."""
    found_D = np.cumsum(true_D, dtype=np.int64)
    return found_D, found_D / np.arange(1, len(true_D) + 1)


class Verdicts(NamedTuple):
    """What the detections of one image and class are worth."""

    true_D: NDArray[np.bool_]
    """It has found a box."""
    counted_D: NDArray[np.bool_]
    """It counts: it has not found a box that nobody needs to find."""


def judge(
    detected_D4: _Floats, truth_G4: _Floats, difficult_G: NDArray[np.bool_] | None = None, threshold: float = 0.5
) -> Verdicts:
    """Whether each detection of one image and class finds a box that no better detection has found.

    As in VOC, a detection is compared with the box that it overlaps most, and counts as false if that box is taken; if
    that box is difficult, it does not count at all.

    Args:
        detected_D4: corners, best first.
        truth_G4: corners of the ground truth; widths are differences, without VOC's extra pixel.
        difficult_G: boxes that need not be found; None: all must.
        threshold: the least IoU.
    """
    true_D, counted_D = np.zeros(len(detected_D4), dtype=np.bool_), np.ones(len(detected_D4), dtype=np.bool_)
    if len(truth_G4) == 0:
        return Verdicts(true_D, counted_D)
    iou_DG = _iou(detected_D4.astype(np.float64), truth_G4.astype(np.float64))
    taken = set()
    for i, best in enumerate(iou_DG.argmax(axis=1)):
        if iou_DG[i, best] < threshold:
            continue
        if difficult_G is not None and difficult_G[best]:
            counted_D[i] = False
        elif best not in taken:
            taken.add(best)
            true_D[i] = True
    return Verdicts(true_D, counted_D)


def _iou(a_D4: NDArray[np.float64], b_G4: NDArray[np.float64]) -> NDArray[np.float64]:
    low = np.maximum(a_D4[:, None, :2], b_G4[None, :, :2])
    high = np.minimum(a_D4[:, None, 2:], b_G4[None, :, 2:])
    intersection_DG = np.prod(np.clip(high - low, 0, None), axis=2)
    area_D, area_G = np.prod(a_D4[:, 2:] - a_D4[:, :2], axis=1), np.prod(b_G4[:, 2:] - b_G4[:, :2], axis=1)
    union_DG = area_D[:, None] + area_G - intersection_DG
    return np.asarray(np.divide(intersection_DG, union_DG, out=np.zeros_like(union_DG), where=union_DG > 0))
