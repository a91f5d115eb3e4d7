"""The FCN network: its size, its upsampling, its output at any image size."""

import pytest
import torch
import torch.nn.functional as F

from models.fcn.network import FCN, bilinear_kernel


@pytest.fixture(scope="module")
def network() -> FCN:
    torch.manual_seed(0)
    return FCN(21).eval()


def test_parameter_count_is_that_of_d2l(network: FCN) -> None:
    assert sum(parameter.numel() for parameter in network.parameters()) == 12_993_642


def test_state_dict_keys_are_readable(network: FCN) -> None:
    keys = set(network.state_dict())
    assert {"backbone.conv1.weight", "backbone.layer4.1.bn2.running_var", "classifier.bias", "upsample.weight"} <= keys
    assert {key.split(".")[0] for key in keys} == {"backbone", "classifier", "upsample"}


@torch.no_grad()
def test_initial_upsampling_is_bilinear_interpolation(network: FCN) -> None:
    scores = torch.randn(1, 21, 4, 5)
    expected = F.interpolate(scores, scale_factor=32, mode="bilinear", align_corners=False)
    # At the rim the transposed convolution fades to zero instead of repeating the last cell.
    interior = (..., slice(16, -16), slice(16, -16))
    torch.testing.assert_close(network.upsample(scores)[interior], expected[interior], atol=1e-5, rtol=1e-5)


def test_bilinear_kernel_of_odd_size() -> None:
    ramp = torch.tensor([0.5, 1.0, 0.5])
    kernel = bilinear_kernel(2, 3)
    assert torch.equal(kernel[0, 0], ramp[:, None] * ramp)
    assert torch.equal(kernel[0, 1], torch.zeros(3, 3))


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (33, 64), (95, 50), (64, 129)])
def test_output_has_the_size_of_the_image(network: FCN, size: tuple[int, int]) -> None:
    assert network(torch.randn(1, 3, *size)).shape == (1, 21, *size)


@pytest.mark.parametrize("size", [(31, 64), (64, 8)])
def test_too_small_an_image_is_named(network: FCN, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} pixels is too small"):
        network(torch.randn(1, 3, *size))


@torch.no_grad()
def test_channels_last_computes_the_same(network: FCN) -> None:
    images = torch.randn(2, 3, 64, 96)
    expected = network(images)
    layout = torch.channels_last
    actual = FCN(21).eval().to(memory_format=layout)
    actual.load_state_dict(network.state_dict())
    torch.testing.assert_close(actual(images.contiguous(memory_format=layout)), expected, atol=1e-3, rtol=1e-3)


def test_initial_weights_come_from_the_global_generator() -> None:
    torch.manual_seed(3)
    first = FCN(4).state_dict()
    torch.manual_seed(3)
    second = FCN(4).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
