"""COCO's average precisions against pycocotools, on made-up detections."""

import contextlib
import io
from typing import Any

import numpy as np
import pytest

from models.detection.coco_metric import CocoImage, coco_average_precision

pytest.importorskip("faster_coco_eval")
NAMES = ("ap", "ap50_coco", "ap75", "ap_small", "ap_medium", "ap_large")


def _made_up(rng: np.random.Generator, count: int) -> list[CocoImage]:
    """Boxes of all sizes; detections near them, elsewhere, and of the wrong class."""
    images = []
    for _ in range(count):
        num = int(rng.integers(0, 6))
        low = rng.uniform(0, 300, (num, 2))
        truth = np.concatenate((low, low + np.exp(rng.uniform(1.5, 5.5, (num, 2)))), axis=1)
        labels = rng.integers(0, 3, num)
        near = truth + rng.normal(0, 3, truth.shape)
        strange = rng.uniform(0, 200, (4, 2))
        found = np.concatenate((near, np.concatenate((strange, strange + 50), axis=1)))
        guessed = np.concatenate((np.where(rng.random(num) < 0.8, labels, 0), rng.integers(0, 3, 4)))
        scores = rng.random(len(found)).astype(np.float32)
        crowd = rng.random(num) < 0.1
        images.append(CocoImage(640, 480, truth, labels, crowd, found, scores, guessed))
    return images


def _by_pycocotools(images: list[CocoImage]) -> dict[str, float]:
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    truth: list[dict[str, Any]] = []
    found = []
    for number, image in enumerate(images):
        for box, label, crowd in zip(image.truth_G4, image.truth_labels_G, image.crowd_G, strict=True):
            x1, y1, x2, y2 = box
            about = {"id": len(truth) + 1, "image_id": number, "category_id": int(label), "iscrowd": int(crowd)}
            truth.append({**about, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)})
        for box, score, label in zip(image.boxes_D4, image.scores_D, image.labels_D, strict=True):
            found.append([number, box[0], box[1], box[2] - box[0], box[3] - box[1], score, label])
    with contextlib.redirect_stdout(io.StringIO()):
        known = coco.COCO()
        known.dataset = {
            "images": [{"id": number, "width": 640, "height": 480} for number in range(len(images))],
            "annotations": truth,
            "categories": [{"id": label} for label in range(3)],
        }
        known.createIndex()
        evaluation = cocoeval.COCOeval(known, known.loadRes(np.array(found, dtype=np.float64)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(NAMES, evaluation.stats[:6], strict=True))


def test_equal_to_pycocotools() -> None:
    images = _made_up(np.random.default_rng(0), 40)
    ours, theirs = coco_average_precision(images, 3), _by_pycocotools(images)
    assert 0.05 < ours["ap"] < ours["ap50_coco"] < 0.95
    assert ours == pytest.approx(theirs, abs=1e-6)


def test_nothing_found_and_nothing_to_find() -> None:
    (image, *_) = (image for image in _made_up(np.random.default_rng(1), 20) if len(image.truth_G4) > 2)
    nothing = np.zeros((0, 4)), np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.int64)
    blind = image._replace(boxes_D4=nothing[0], scores_D=nothing[1], labels_D=nothing[2])
    assert set(coco_average_precision([blind], 3).values()) == {0.0}
    empty = image._replace(truth_G4=nothing[0], truth_labels_G=nothing[2], crowd_G=np.zeros(0, dtype=np.bool_))
    assert coco_average_precision([empty], 3) == {}
