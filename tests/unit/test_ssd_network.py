import pytest
import torch
import torch.nn.functional as F

from models.ssd.anchors import anchors
from models.ssd.network import TinySSD


def test_parameters_and_keys():
    network = TinySSD(1)
    assert sum(p.numel() for p in network.parameters()) == 1_010_376
    keys = network.state_dict().keys()
    assert {key.rsplit(".", 1)[0] for key in keys if "head" in key} == {
        f"{kind}_heads.{i}" for kind in ("class", "box") for i in range(5)
    }
    assert "blocks.0.0.0.weight" in keys
    assert not any("anchor" in key for key in keys)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (65, 100)])
def test_predictions_fit_the_anchors(height, width):
    scores, offsets = TinySSD(3).eval()(torch.zeros(2, 3, height, width))
    num_anchors = len(anchors(height, width))
    assert scores.shape == (2, num_anchors, 4)
    assert offsets.shape == (2, num_anchors, 4)


def test_prediction_order_is_position_then_anchor_then_value():
    torch.manual_seed(0)
    network = TinySSD(2).eval()
    images = torch.randn(1, 3, 64, 64)
    scores, _ = network(images)
    head = network.class_heads[0](network.blocks[0](images))
    row, column, anchor = 3, 5, 2
    torch.testing.assert_close(
        scores[0, (row * 8 + column) * 4 + anchor], head[0, anchor * 3 : anchor * 3 + 3, row, column]
    )


def test_channels_last_agrees():
    torch.manual_seed(0)
    network = TinySSD(1).eval()
    images = torch.randn(2, 3, 64, 64)
    expected = network(images)
    got = network.to(memory_format=torch.channels_last)(images.contiguous(memory_format=torch.channels_last))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pooling_the_whole_map_equals_adaptive_pooling_to_the_bit(layout):
    torch.manual_seed(0)
    values = torch.randn(3, 128, 4, 5).relu().contiguous(memory_format=layout)
    ours, theirs = (values.clone().requires_grad_() for _ in range(2))
    a, b = F.max_pool2d(ours, kernel_size=(4, 5)), F.adaptive_max_pool2d(theirs, (1, 1))
    a.square().sum().backward()
    b.square().sum().backward()
    assert torch.equal(a, b)
    assert torch.equal(ours.grad, theirs.grad)
