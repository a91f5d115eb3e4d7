"""The confusion matrix: a case worked by hand, merging, pickling."""

import math
import pickle
from itertools import permutations

import pytest
import torch

from models.data.voc_classes import VOID
from models.fcn.metric import SegmentationMetric
from models.task import Batch

NAMES = ("background", "cat", "dog", "never")


def _metric(predicted: list[list[int]], truth: list[list[int]]) -> SegmentationMetric:
    metric = SegmentationMetric(NAMES)
    mask_NHW = torch.tensor([truth], dtype=torch.uint8)
    batch = Batch(torch.zeros(1, 3, *mask_NHW.shape[1:]), {"mask": mask_NHW}, torch.tensor([0]))
    metric.update(torch.tensor([predicted], dtype=torch.uint8), batch)
    return metric


def test_a_case_worked_by_hand() -> None:
    metric = _metric(predicted=[[0, 0, 1, 2], [1, 1, 0, 3]], truth=[[0, 0, 0, 0], [1, 1, 1, VOID]])
    values = metric.compute()
    # background: 2 of 4 found, 1 false; cat: 2 of 3 found, 1 false; dog: never true, once predicted.
    assert values.pop("pixel_accuracy") == pytest.approx(4 / 7)
    assert values.pop("mean_accuracy") == pytest.approx((2 / 4 + 2 / 3) / 2)
    assert values.pop("mean_iou") == pytest.approx((2 / 5 + 2 / 4 + 0) / 3)
    assert values == {"iou/background": pytest.approx(2 / 5), "iou/cat": pytest.approx(2 / 4), "iou/dog": 0}


def test_many_classes_do_not_overflow_a_byte() -> None:
    metric = SegmentationMetric([str(label) for label in range(255)])
    labels = torch.arange(255, dtype=torch.uint8).view(1, 15, 17)
    metric.update(labels, Batch(torch.zeros(1, 3, 15, 17), {"mask": labels}, torch.tensor([0])))
    assert metric.compute()["mean_iou"] == 1


def test_merging_in_any_order_gives_the_same_values() -> None:
    parts = [_metric([[0, 1]], [[1, 1]]), _metric([[2, 2]], [[2, 0]]), _metric([[0, 0]], [[0, VOID]])]
    values = []
    for order in permutations(parts):
        merged = SegmentationMetric(NAMES)
        for part in order:
            merged.merge(part)
        values.append(merged.compute())
    assert all(value == values[0] for value in values)
    assert values[0] == _metric([[0, 1, 2, 2, 0, 0]], [[1, 1, 2, 0, 0, VOID]]).compute()


def test_a_pickled_metric_goes_on_counting() -> None:
    metric = pickle.loads(pickle.dumps(_metric([[0, 1]], [[1, 1]])))
    metric.merge(_metric([[2, 2]], [[2, 0]]))
    assert metric.compute() == _metric([[0, 1, 2, 2]], [[1, 1, 2, 0]]).compute()


def test_nothing_counted_is_nan() -> None:
    values = _metric([[1]], [[VOID]]).compute()
    assert set(values) == {"pixel_accuracy", "mean_accuracy", "mean_iou"}
    assert all(math.isnan(value) for value in values.values())
