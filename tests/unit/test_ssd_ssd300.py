"""SSD300 is held against torchvision's, which is another implementation of the same paper."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models import resnet50
from torchvision.models.detection import ssd300_vgg16 as torchvision_ssd300
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList

from models.data.pixels import CAFFE
from models.detection.outputs import PADDING
from models.errors import TaskError
from models.options import TaskOptions
from models.ssd.detect import detect_by_class
from models.ssd.multibox import match_targets, multibox_loss
from models.ssd.ssd300 import FEATURE_MAPS, default_boxes, ssd300_resnet50, ssd300_vgg16
from models.ssd.task import SSDTask

BOXES = torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.12, 0.1, 0.5, 0.62], [0.0, 0.0, 0.04, 0.03], [0.2, 0.2, 1.0, 0.9]])
LABELS = torch.tensor([0, 2, 1, 0])
TRUTH = torch.stack([BOXES, BOXES.flip(0)]), torch.tensor([LABELS.tolist(), [1, PADDING, 2, PADDING]])


@pytest.fixture(scope="module")
def theirs() -> Any:
    torch.manual_seed(0)
    return torchvision_ssd300(weights=None, weights_backbone=None, num_classes=4)


def test_default_boxes_are_torchvisions_and_the_papers(theirs: Any) -> None:
    boxes = default_boxes(300, 300)
    assert boxes.shape == (8732, 4)
    generator: DefaultBoxGenerator = theirs.anchor_generator
    images = ImageList(torch.empty(1, 3, 300, 300), [(300, 300)])
    (want,) = generator(images, [torch.empty(1, 1, side, side) for side in FEATURE_MAPS])
    assert torch.equal(boxes, want / 300)
    sides = (300 * (boxes[:, 2] - boxes[:, 0])).round().int()
    first = [0]
    for side, count in zip(FEATURE_MAPS[:-1], (4, 6, 6, 6, 4), strict=True):
        first.append(first[-1] + side * side * count)
    assert [int(sides[i]) for i in first] == [21, 45, 99, 153, 207, 261]
    assert int(sides[first[0] + 1]) == round((21 * 45) ** 0.5)


def test_loss_and_gradients_are_torchvisions_before_its_division(theirs: Any) -> None:
    torch.manual_seed(1)
    images = torch.rand(2, 3, 300, 300)
    targets = [
        {"boxes": 300 * boxes[labels != PADDING], "labels": labels[labels != PADDING] + 1}
        for boxes, labels in zip(*TRUTH, strict=True)
    ]
    theirs.train().zero_grad()
    losses = theirs(list(images), targets)
    ours = ssd300_vgg16(3)
    ours.load_state_dict(theirs.state_dict())  # every key fits, and no other is left
    scaled = theirs.transform(list(images))[0].tensors
    torch.testing.assert_close(
        torch.stack([CAFFE.scale(255 * image) for image in images]), scaled, atol=1e-4, rtol=1e-5
    )
    scores, offsets = ours(scaled)
    matched = match_targets(default_boxes(300, 300), *TRUTH)
    total, weight = multibox_loss(scores, offsets, matched)
    assert weight.item() == matched.mask_NA.sum() > 20
    torch.testing.assert_close(total / weight.float(), losses["classification"] + losses["bbox_regression"])
    (losses["classification"] + losses["bbox_regression"]).backward()
    (total / weight.float()).backward()
    want = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        tolerance = 1e-5 * float(want[name].grad.abs().max())
        torch.testing.assert_close(parameter.grad, want[name].grad, atol=tolerance, rtol=1e-4, msg=name)


def test_detections_are_torchvisions(theirs: Any) -> None:
    torch.manual_seed(2)
    scores, offsets = 3 * torch.randn(2, 8732, 4), torch.randn(2, 8732, 4)
    anchors = 300 * default_boxes(300, 300)
    head = {"cls_logits": scores, "bbox_regression": offsets}
    want = theirs.postprocess_detections(head, [anchors, anchors], [(300, 300)] * 2)
    for found, expected in zip(detect_by_class(default_boxes(300, 300), scores, offsets), want, strict=True):
        torch.testing.assert_close(found.scores_D, expected["scores"])
        assert torch.equal(found.labels_D + 1, expected["labels"])
        torch.testing.assert_close(300 * found.boxes_D4, expected["boxes"], atol=1e-3, rtol=1e-4)


def test_every_object_has_a_box_and_padding_has_none() -> None:
    boxes, labels = TRUTH
    matched = match_targets(default_boxes(300, 300), boxes, labels)
    assert sorted(set(matched.labels_NA[0].tolist())) == [0, 1, 2, 3]
    assert sorted(set(matched.labels_NA[1].tolist())) == [0, 2, 3]
    assert torch.isfinite(matched.offsets_NA4).all()
    empty = match_targets(default_boxes(300, 300), torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64))
    assert not empty.mask_NA.any()


def _predictions(count: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(count, 8732, 4, requires_grad=True), torch.randn(count, 8732, 4, requires_grad=True)


def test_any_split_has_the_same_sum_and_weight() -> None:
    scores, offsets = _predictions(2)
    matched = match_targets(default_boxes(300, 300), *TRUTH)
    whole = multibox_loss(scores, offsets, matched)
    parts = [
        multibox_loss(scores[i : i + 1], offsets[i : i + 1], type(matched)(*(part[i : i + 1] for part in matched)))
        for i in (0, 1)
    ]
    torch.testing.assert_close(parts[0].total + parts[1].total, whole.total)
    assert parts[0].weight + parts[1].weight == whole.weight


def test_without_objects_the_sum_is_zero_and_attached() -> None:
    scores, offsets = _predictions(1)
    matched = match_targets(default_boxes(300, 300), torch.zeros(1, 1, 4), torch.full((1, 1), PADDING))
    total, weight = multibox_loss(scores, offsets, matched)
    total.backward()
    assert total.item() == weight.item() == 0
    assert scores.grad is not None
    assert not scores.grad.any()


def test_on_resnet50_it_has_the_same_boxes_and_torchvisions_keys() -> None:
    network = ssd300_resnet50(20).eval()
    with torch.no_grad():
        maps = list(network.backbone(torch.zeros(1, 3, 300, 300)).values())
        scores, offsets = network(torch.zeros(1, 3, 300, 300))
    assert [tuple(x.shape[1:]) for x in maps] == [
        (channels, side, side) for channels, side in zip((1024, 512, 512, 256, 256, 256), FEATURE_MAPS, strict=True)
    ]
    assert scores.shape == (1, 8732, 21)
    assert offsets.shape == (1, 8732, 4)
    prefix = "backbone.features."
    inside = {key.removeprefix(prefix) for key in network.state_dict() if key.startswith(prefix)}
    assert inside == {key for key in resnet50(weights=None).state_dict() if not key.startswith(("layer4", "fc"))}


def test_other_sizes_are_refused() -> None:
    with pytest.raises(TaskError, match="320x300: ssd300_vgg16 takes images of 300x300 alone"):
        SSDTask(TaskOptions(model="ssd300_vgg16", image_size=(320, 300)))
    with pytest.raises(TaskError, match="no recipe 'd2l'"):
        SSDTask(TaskOptions(model="ssd300_resnet50", recipe="d2l"))
