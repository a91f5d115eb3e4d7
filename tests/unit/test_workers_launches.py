"""How long a forward pass is for a device's queue."""

import pytest
import torch
from torch import nn

from workers.launches import Launches


def _net(layers: int) -> nn.Module:
    return nn.Sequential(*[layer for _ in range(layers) for layer in (nn.Linear(4, 4), nn.ReLU())])


@pytest.mark.parametrize(("layers", "fits"), [(3, True), (400, False)])
def test_a_pass_fits_if_it_has_few_operations(layers: int, fits: bool) -> None:
    launches, net = Launches(), _net(layers)
    assert not launches.fit, "none was counted"
    launches.begin()
    loss = net(torch.ones(2, 4)).sum()
    launches.end()
    loss.backward()
    assert launches.fit is fits
    launches.begin()
    _net(400 if fits else 3)(torch.ones(2, 4))
    launches.end()
    assert launches.fit is fits, "one pass is enough"


def test_views_and_memory_launch_nothing_and_bits_are_the_same() -> None:
    launches, net, images = Launches(), _net(3), torch.randn(2, 4)
    wanted = net(images)
    launches.begin()
    found = net(images)
    for _ in range(1000):
        images.view(4, 2).transpose(0, 1).unsqueeze(0)
        torch.empty(3)
    launches.end()
    assert launches.fit
    assert torch.equal(found, wanted)


def test_a_pass_that_is_interrupted_counts_nothing_more() -> None:
    launches = Launches()
    launches.begin()
    launches.end()
    launches.end()
    torch.ones(3) + 1
    assert launches.fit
