import itertools
import math
import pickle

import numpy as np
import pytest
import torch

from models.detection.average_precision import average_precision, eleven_point, judge
from models.detection.metric import DetectionMetric
from models.detection.outputs import PADDING, AnchorErrors, DetectionOutputs, Detections
from models.ssd.anchor_errors import anchor_errors
from models.ssd.matching import build_targets
from models.task import Batch

A, B, C = [0.1, 0.1, 0.3, 0.3], [0.5, 0.5, 0.9, 0.9], [0.6, 0.1, 0.8, 0.3]


def _output(detections, *, wrong=0, absolute=0.0):
    boxes = torch.tensor([box for box, _, _ in detections]).reshape(-1, 4)
    scores = torch.tensor([score for _, score, _ in detections])
    labels = torch.tensor([label for _, _, label in detections], dtype=torch.int64)
    errors = AnchorErrors(torch.tensor([wrong]), torch.tensor([absolute], dtype=torch.float64), 10)
    return DetectionOutputs([Detections(boxes, scores, labels)], errors)


def _batch(image_id, truth):
    boxes = torch.tensor([box for box, _ in truth] + [[0.0] * 4])  # one row of padding
    labels = torch.tensor([label for _, label in truth] + [PADDING])
    targets = {"boxes": boxes[None], "labels": labels[None], "difficult": torch.zeros(1, len(labels), dtype=torch.bool)}
    return Batch(torch.zeros(1, 3, 1, 1), {**targets, "size": torch.tensor([[200, 300]])}, torch.tensor([image_id]))


@pytest.mark.parametrize(
    ("true", "num_boxes", "expected"),
    [
        ([], 2, 0.0),
        ([True, True], 2, 1.0),
        ([True, False, True], 2, 0.5 * 1 + 0.5 * 2 / 3),
        ([False, True, True, False, True], 4, 0.25 * 2 / 3 + 0.25 * 2 / 3 + 0.25 * 3 / 5),
        ([False, False], 1, 0.0),
    ],
)
def test_average_precision_worked_by_hand(true, num_boxes, expected):
    assert average_precision(np.array(true, dtype=bool), num_boxes) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("true", "num_boxes", "expected"),
    [
        ([], 2, 0.0),
        ([True, True], 2, 1.0),
        # Precision 1 up to recall 1/2 (0 to 0.5), 2/3 up to recall 1 (0.6 to 1).
        ([True, False, True], 2, (6 * 1 + 5 * 2 / 3) / 11),
        # Recall 3/10 is reached with precision 1: 0, 0.1, 0.2 and 0.3 itself; then nothing.
        ([True, True, True], 10, 4 / 11),
    ],
)
def test_eleven_points_worked_by_hand(true, num_boxes, expected):
    assert eleven_point(np.array(true, dtype=bool), num_boxes) == pytest.approx(expected)


def test_a_difficult_box_need_not_be_found_and_finding_it_does_not_count():
    verdicts = judge(np.array([A, B, C]), np.array([A, B]), np.array([False, True]))
    assert verdicts.true_D.tolist() == [True, False, False]
    assert verdicts.counted_D.tolist() == [True, False, True]
    metric = DetectionMetric(["x"])
    batch = _batch(0, [(A, 0), (B, 0)])
    batch.targets["difficult"] = torch.tensor([[False, True, False]])
    metric.update(_output([(B, 0.9, 0), (A, 0.8, 0)]), batch)
    assert metric.compute()["ap50"] == metric.compute()["ap50_11point"] == 1.0


def test_no_ground_truth_is_not_a_number():
    assert math.isnan(average_precision(np.array([False]), 0))


def test_a_box_is_found_once():
    shifted = [0.1, 0.1, 0.3, 0.28]
    assert judge(np.array([A, shifted, B]), np.array([A, B])).true_D.tolist() == [True, False, True]


def test_overlap_of_exactly_half_counts_without_an_extra_pixel():
    assert judge(np.array([[0.0, 0.0, 1.0, 0.5]]), np.array([[0.0, 0.0, 1.0, 1.0]])).true_D.all()
    assert not judge(np.array([[0.0, 0.0, 1.0, 0.49]]), np.array([[0.0, 0.0, 1.0, 1.0]])).true_D.any()


def test_compute_worked_by_hand():
    metric = DetectionMetric(["x", "y", "z"])
    metric.update(_output([(A, 0.9, 0), (C, 0.8, 0), (B, 0.7, 1)], wrong=3, absolute=2.0), _batch(0, [(A, 0), (B, 1)]))
    metric.update(_output([(B, 0.75, 0)], wrong=1, absolute=4.0), _batch(1, [(B, 0)]))
    values = metric.compute()
    assert values["ap50/x"] == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert values["ap50/y"] == 1.0
    assert math.isnan(values["ap50/z"])
    assert values["ap50"] == pytest.approx((0.5 + 0.5 * 2 / 3 + 1.0) / 2)
    assert values["class_error"] == pytest.approx(4 / 20)
    assert values["box_mae"] == pytest.approx(6 / 80)


def test_one_class_has_no_values_by_class_and_nothing_seen_is_not_a_number():
    values = DetectionMetric(["x"]).compute()
    assert values.keys() >= {"ap50", "ap50_11point", "class_error", "box_mae"}
    assert not any("/" in name for name in values)
    assert all(math.isnan(value) for value in values.values())


def test_any_order_of_merges_through_pickles_gives_the_same_value():
    torch.manual_seed(0)
    parts = []
    for image_id in range(4):
        # Equal scores in different images: the tie must be broken by image, not by arrival.
        found = [(torch.rand(2).sort().values.repeat(2)[[0, 2, 1, 3]].tolist(), 0.5, 0), (A, 0.5, 0), (B, 0.5, 0)]
        part = DetectionMetric(["x"])
        part.update(
            _output(found, wrong=image_id, absolute=0.1 * 3**image_id), _batch(image_id, [(A, 0)] * (image_id % 3))
        )
        parts.append(pickle.dumps(part))
    values = []
    for order in itertools.permutations(parts):
        whole = DetectionMetric(["x"])
        for part in order:
            whole.merge(pickle.loads(part))
        values.append(whole.compute())
    assert len({repr(value) for value in values}) == 1, "NaN is not equal to itself"


def test_an_image_seen_twice_counts_once():
    once, twice = DetectionMetric(["x"]), DetectionMetric(["x"])
    for metric in (once, twice, twice):
        metric.update(_output([(A, 0.9, 0)], wrong=2), _batch(5, [(A, 0)]))
    assert repr(once.compute()) == repr(twice.compute())


def test_anchor_errors_are_the_books():
    anchor_boxes = torch.tensor([A, B, C])
    targets = build_targets(anchor_boxes, torch.tensor([[A], [B]]), torch.tensor([[0], [0]]))
    scores = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    offsets = torch.full((2, 3, 4), 0.25)
    errors = anchor_errors(scores, offsets, targets)
    assert errors.wrong_N.tolist() == [1, 1]
    torch.testing.assert_close(errors.absolute_N, torch.ones(2, dtype=torch.float64), atol=1e-4, rtol=0)
    assert errors.num_anchors == 3
