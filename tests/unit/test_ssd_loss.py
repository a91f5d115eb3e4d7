import pytest
import torch
from torch import nn

from models.detection.outputs import PADDING
from models.ssd.anchors import anchors
from models.ssd.loss import ssd_loss
from models.ssd.matching import Targets, build_targets
from models.ssd.network import TinySSD


def _predictions(num_images, num_classes=2):
    num_anchors = len(anchors(64, 64))
    return (
        torch.randn(num_images, num_anchors, num_classes + 1, requires_grad=True),
        torch.randn(num_images, num_anchors, 4, requires_grad=True),
    )


def _truth():
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.4, 0.3, 0.9, 0.9]]).repeat(5, 1, 1)
    labels = torch.tensor([[0, 1], [1, PADDING], [PADDING, PADDING], [1, 1], [0, PADDING]])
    return boxes, labels


def test_equals_the_books_formula():
    torch.manual_seed(0)
    scores, offsets = _predictions(5)
    targets = build_targets(anchors(64, 64), *_truth())
    mask = targets.mask_NA[..., None].expand(-1, -1, 4).float()
    classes = nn.CrossEntropyLoss(reduction="none")(scores.reshape(-1, 3), targets.labels_NA.reshape(-1))
    boxes = nn.L1Loss(reduction="none")(offsets * mask, targets.offsets_NA4 * mask).reshape(5, -1).mean(dim=1)
    total, weight = ssd_loss(scores, offsets, targets)
    torch.testing.assert_close(total, (classes.reshape(5, -1).mean(dim=1) + boxes).sum())
    assert weight.item() == 5
    assert weight.dtype == torch.float64


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_any_split_has_the_same_sum_and_weight(cut):
    torch.manual_seed(0)
    scores, offsets = _predictions(5)
    boxes, labels = _truth()

    def part(chosen):
        targets = build_targets(anchors(64, 64), boxes[chosen], labels[chosen])
        return ssd_loss(scores[chosen], offsets[chosen], targets)

    whole, first, second = part(slice(0, 5)), part(slice(0, cut)), part(slice(cut, 5))
    torch.testing.assert_close(first.total + second.total, whole.total)
    assert first.weight + second.weight == whole.weight


@pytest.mark.parametrize("num_boxes", [0, 3])
def test_attached_to_every_parameter_without_any_box(num_boxes):
    torch.manual_seed(0)
    network = TinySSD(1)
    scores, offsets = network(torch.randn(2, 3, 64, 64))
    targets = build_targets(anchors(64, 64), torch.zeros(2, num_boxes, 4), torch.full((2, num_boxes), PADDING))
    total, weight = ssd_loss(scores, offsets, targets)
    total.backward()
    assert weight.item() == 2
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert not network.box_heads[0].weight.grad.any()


def test_background_anchors_with_infinite_offsets_cost_nothing():
    scores, offsets = _predictions(1)
    shape = scores.shape[:2]
    targets = Targets(torch.zeros(shape, dtype=torch.int64), torch.zeros(*shape, 4), torch.zeros(shape).bool())
    expected = ssd_loss(scores, torch.zeros_like(offsets), targets).total
    assert torch.equal(ssd_loss(scores, torch.full_like(offsets, torch.inf), targets).total, expected)
