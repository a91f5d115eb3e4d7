import pytest
import torch
from torchvision.ops import box_iou

from models.detection.outputs import PADDING
from models.ssd.anchors import anchors
from models.ssd.matching import assign, build_targets, iou
from models.ssd.offsets import decode, encode


def _assign_one(boxes, anchor_boxes, threshold=0.5):
    """The book's loop, for one image."""
    num_anchors, num_boxes = len(anchor_boxes), len(boxes)
    assigned = torch.full((num_anchors,), -1)
    if num_boxes == 0:
        return assigned
    overlap = box_iou(anchor_boxes, boxes)
    best, index = overlap.max(dim=1)
    assigned[best >= threshold] = index[best >= threshold]
    for _ in range(num_boxes):
        flat = int(overlap.argmax())
        anchor, box = divmod(flat, num_boxes)
        assigned[anchor] = box
        overlap[:, box] = -1
        overlap[anchor, :] = -1
    return assigned


def _random_batch(counts, *, grid=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.zeros(len(counts), max(counts), 4)
    labels = torch.full((len(counts), max(counts)), PADDING)
    for i, count in enumerate(counts):
        low = torch.rand(count, 2, generator=generator) * 0.8
        corners = torch.cat((low, low + 0.05 + torch.rand(count, 2, generator=generator) * 0.5), dim=1)
        if grid is not None:  # few different values: many boxes and overlaps are equal
            corners = (corners * grid).round() / grid
            corners[:, 2:] = torch.maximum(corners[:, 2:], corners[:, :2] + 1 / grid)
        boxes[i, :count] = corners
        labels[i, :count] = torch.randint(3, (count,), generator=generator)
    return boxes, labels


@pytest.mark.parametrize("counts", [(1,), (0, 1, 3), (2, 0, 0), (30, 1, 12, 0), (60, 60)])
@pytest.mark.parametrize("grid", [None, 4])
def test_equals_the_books_loop(counts, grid):
    anchor_boxes = anchors(96, 96)
    for seed in range(5):
        boxes, labels = _random_batch(counts, grid=grid, seed=seed)
        got = assign(anchor_boxes, boxes, labels)
        for i, count in enumerate(counts):
            assert torch.equal(got[i], _assign_one(boxes[i, :count], anchor_boxes))


def test_equals_the_books_loop_for_equal_boxes():
    boxes = torch.tensor([0.2, 0.2, 0.6, 0.7]).repeat(1, 8, 1)
    got = assign(anchors(96, 96), boxes, torch.zeros(1, 8, dtype=torch.int64))
    assert torch.equal(got[0], _assign_one(boxes[0], anchors(96, 96)))


def test_more_boxes_than_anchors_uses_every_anchor_once():
    anchor_boxes = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]])
    boxes = torch.tensor([[[0.0, 0.0, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9], [0.0, 0.0, 0.2, 0.2]]])
    assert assign(anchor_boxes, boxes, torch.zeros(1, 3, dtype=torch.int64)).tolist() == [[0, 1]]


def test_the_books_example():
    truth = torch.tensor([[[0.1, 0.08, 0.52, 0.92], [0.55, 0.2, 0.9, 0.88]]])
    anchor_boxes = torch.tensor(
        [
            [0, 0.1, 0.2, 0.3],
            [0.15, 0.2, 0.4, 0.4],
            [0.63, 0.05, 0.88, 0.98],
            [0.66, 0.45, 0.8, 0.8],
            [0.57, 0.3, 0.92, 0.9],
        ]
    )
    targets = build_targets(anchor_boxes, truth, torch.tensor([[0, 1]]))
    assert targets.labels_NA.tolist() == [[0, 1, 2, 0, 2]]
    assert targets.mask_NA.tolist() == [[False, True, True, False, True]]
    expected = torch.tensor(
        [
            [0, 0, 0, 0],
            [1.40, 10.0, 2.59, 7.18],
            [-1.20, 0.269, 1.68, -1.57],
            [0, 0, 0, 0],
            [-0.571, -1.00, 4.17e-06, 0.626],
        ]
    )
    torch.testing.assert_close(targets.offsets_NA4[0], expected, atol=0.006, rtol=0)


def test_padding_changes_nothing():
    anchor_boxes = anchors(96, 96)
    boxes, labels = _random_batch((3,))
    wide = torch.cat((boxes, torch.rand(1, 4, 4)), dim=1)
    wide_labels = torch.cat((labels, torch.full((1, 4), PADDING)), dim=1)
    for a, b in zip(
        build_targets(anchor_boxes, boxes, labels), build_targets(anchor_boxes, wide, wide_labels), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("num_boxes", [0, 2])
def test_images_without_boxes_are_background(num_boxes):
    anchor_boxes = anchors(64, 64)
    targets = build_targets(anchor_boxes, torch.zeros(3, num_boxes, 4), torch.full((3, num_boxes), PADDING))
    assert targets.labels_NA.shape == (3, len(anchor_boxes))
    assert not targets.labels_NA.any()
    assert not targets.mask_NA.any()
    assert not targets.offsets_NA4.any()
    assert targets.labels_NA.dtype == torch.int64


def test_iou_agrees_with_torchvision():
    boxes, _ = _random_batch((5, 5))
    got = iou(anchors(64, 64), boxes)
    for i in range(2):
        assert torch.equal(got[i].T, box_iou(anchors(64, 64), boxes[i]))


def test_decode_inverts_encode():
    anchor_boxes = anchors(64, 64)
    low = torch.rand(2, len(anchor_boxes), 2) * 0.5
    boxes = torch.cat((low, low + 0.1 + 0.4 * torch.rand_like(low)), dim=2)
    torch.testing.assert_close(decode(anchor_boxes, encode(anchor_boxes, boxes)), boxes, atol=1e-4, rtol=1e-4)


def test_decode_keeps_wild_offsets_finite():
    anchor_boxes = anchors(64, 64)
    assert decode(anchor_boxes, torch.full((1, len(anchor_boxes), 4), 1e6)).isfinite().all()
