"""COCO's average precisions, as faster-coco-eval computes them: an extra, ``pip install pushpull-sgd[coco]``."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["CocoImage", "coco_average_precision"]

_NAMES = ("ap", "ap50_coco", "ap75", "ap_small", "ap_medium", "ap_large")


class CocoImage(NamedTuple):
    """Ground truth and detections of one image, in its own pixels."""

    width: int
    height: int
    truth_G4: NDArray[np.float64]
    """Corners."""
    truth_labels_G: NDArray[np.int64]
    crowd_G: NDArray[np.bool_]
    """What need not be found."""
    boxes_D4: NDArray[np.float64]
    scores_D: NDArray[np.float32]
    labels_D: NDArray[np.int64]


def coco_average_precision(images: Sequence[CocoImage], num_classes: int) -> dict[str, float]:
    """Average precision by COCO's rules.

    Returns:
        ``ap`` (mean over IoU 0.50 to 0.95), ``ap50_coco``, ``ap75``, and ``ap_small``, ``ap_medium``, ``ap_large`` (up
        to 32 x 32 pixels, up to 96 x 96, above); without those for which there is no ground truth. Empty if
        faster-coco-eval is not installed.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError:
        return {}
    truth: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for image_id, image in enumerate(images, start=1):
        for box, label, crowd in zip(image.truth_G4, image.truth_labels_G, image.crowd_G, strict=True):
            row = _row(image_id, box, int(label))
            truth.append({**row, "id": len(truth) + 1, "iscrowd": int(crowd), "area": row["bbox"][2] * row["bbox"][3]})
        for box, score, label in zip(image.boxes_D4, image.scores_D, image.labels_D, strict=True):
            found.append({**_row(image_id, box, int(label)), "score": float(score)})
    if not truth or not found:
        return dict.fromkeys(_NAMES[:3], 0.0) if truth else {}
    with contextlib.redirect_stdout(io.StringIO()):  # it talks
        known = COCO(
            {
                "images": [
                    {"id": image_id, "width": image.width, "height": image.height}
                    for image_id, image in enumerate(images, start=1)
                ],
                "annotations": truth,
                "categories": [{"id": label, "name": str(label)} for label in range(num_classes)],
            }
        )
        evaluation = COCOeval_faster(known, known.loadRes(found), iouType="bbox", print_function=lambda *_: None)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # It says -1 where there is nothing to find.
    return {name: float(value) for name, value in zip(_NAMES, evaluation.stats[:6], strict=True) if value >= 0}


def _row(image_id: int, box: NDArray[np.float64], label: int) -> dict[str, Any]:
    x1, y1, x2, y2 = (float(value) for value in box)
    return {"image_id": image_id, "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1]}
