"""Stage 7 in numbers: the divisor, clipping, and float buffers (E1, E4, E8)."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from paramserver.config import OptimizerConfig
from paramserver.messages import MicrobatchStats, Report
from paramserver.reduction import Node
from paramserver.vote import decide
from tests.support.servers import Fleet, bits_equal, rows_of


def _rows(weights: list[float], samples: list[int]) -> tuple[MicrobatchStats, ...]:
    pairs = zip(weights, samples, strict=True)
    return tuple(MicrobatchStats(index, 0.0, weight, count) for index, (weight, count) in enumerate(pairs))


@pytest.mark.parametrize(
    ("weights", "divisor"), [([8.0], 8.0), ([0.5], 1.0), ([0.0], 1.0), ([0.5, 0.25], 1.0), ([0.5, 1.5], 2.0)]
)
def test_a_total_weight_below_one_counts_as_one_over_the_whole_minibatch(weights: list[float], divisor: float) -> None:
    fleet = Fleet({"w": torch.zeros(3)}, num_microbatches=len(weights))
    fleet.step({"w": torch.full((3,), 24.0)}, stats=_rows(weights, [1] * len(weights)))
    assert torch.equal(fleet.state().values["w"], torch.full((3,), -24.0 / divisor))


def test_root_over_weight_is_a_true_division() -> None:
    """The product with a reciprocal would give other bits for some of these numbers."""
    sums = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    fleet = Fleet({"w": torch.zeros(1000)})
    fleet.step({"w": sums}, stats=_rows([7.0], [7]))
    assert torch.equal(fleet.state().values["w"], -(sums / 7.0))
    assert not torch.equal(sums / 7.0, sums * (1.0 / 7.0))


@pytest.mark.parametrize("num_microbatches", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"weight_decay": 0.1, "clip_grad_norm": 1e-3},
        {"name": "adam", "weight_decay": 0.1},
        {"on_nan": "skip"},
    ],
)
def test_what_was_pushed_is_read_and_never_written(settings: dict[str, Any], num_microbatches: int) -> None:
    """A worker's memory is the worker's: also where one push is the root, and nothing has to be added."""
    values = {"w": torch.randn(150), "bn": torch.randn(3)}
    fleet = Fleet(values, OptimizerConfig(lr=0.1, **settings), num_microbatches=num_microbatches, buffers=["bn"])
    client = fleet.client()
    for step in range(2):
        pushed = [torch.randn(fleet.partition.length) for _ in range(num_microbatches)]
        copies = [vector.clone() for vector in pushed]
        for index, vector in enumerate(pushed):
            client.push(step, Node(index, index + 1), vector, rows_of(Node(index, index + 1), weight=2.0), {})
        client.wait(step + 1)
        assert all(torch.equal(vector, copy) for vector, copy in zip(pushed, copies, strict=True))


# -- float buffers -----------------------------------------------------------------------------------------------------


def test_float_buffers_take_the_mean_change_by_samples_not_by_weight() -> None:
    values = {"w": torch.zeros(3), "bn.mean": torch.tensor([1.0, 10.0]), "bn.var": torch.tensor([4.0])}
    fleet = Fleet(values, num_microbatches=3, buffers=["bn.mean", "bn.var"])
    after = [torch.tensor([2.0, 10.0]), torch.tensor([5.0, 12.0]), torch.tensor([1.0, 10.0])]  # the last one is empty
    samples = [6, 2, 0]
    client = fleet.client()
    for index, (value, count) in enumerate(zip(after, samples, strict=True)):
        change = {"bn.mean": count * (value - values["bn.mean"]), "w": torch.full((3,), 10.0)}
        rows = (MicrobatchStats(index, 0.0, [100.0, 0.0, 0.0][index], count),)
        client.push(0, Node(index, index + 1), fleet.flatten(change), rows, {})
    client.wait(1)
    state = fleet.state()
    assert torch.equal(state.values["bn.mean"], torch.tensor([1.0 + (6 * 1 + 2 * 4) / 8, 10.0 + (2 * 2) / 8]))
    assert torch.equal(state.values["bn.var"], values["bn.var"])
    assert torch.equal(state.values["w"], torch.full((3,), -30.0 / 100))


def test_a_buffer_that_nobody_touched_keeps_its_bits() -> None:
    untouched = torch.tensor([0.1, 1e-30, 3e38, -7.3, 1 / 3, 2.0**-149])
    fleet = Fleet(
        {"w": torch.zeros(3), "touched": torch.full((6,), 0.1), "untouched": untouched},
        OptimizerConfig(lr=0.1, momentum=0.9, weight_decay=0.1),
        buffers=["touched", "untouched"],
        num_servers=2,
    )
    for _ in range(3):
        fleet.step({"w": torch.ones(3), "touched": torch.ones(6)}, stats=_rows([3.0], [3]))
    values = fleet.state().values
    assert bits_equal({"": values["untouched"]}, {"": untouched})
    assert not torch.equal(values["touched"], torch.full((6,), 0.1))


def test_buffers_have_no_optimizer_state_and_neither_decay_nor_clipping() -> None:
    config = OptimizerConfig(lr=0.5, momentum=0.5, weight_decay=0.5, clip_grad_norm=1e-3)
    fleet = Fleet({"w": torch.ones(3), "bn": torch.ones(3)}, config, buffers=["bn"])
    fleet.step({"w": torch.ones(3), "bn": torch.full((3,), 8.0)}, stats=_rows([4.0], [4]))
    assert torch.equal(fleet.state().values["bn"], torch.full((3,), 3.0))
    assert fleet.state().optimizer.keys() == {"w"}


# -- clipping ----------------------------------------------------------------------------------------------------------


def _model() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(16, 8, 3, 3), (16,), (), (1,), (33, 7), (10,)]
    return {f"key{index}": torch.randn(shape, generator=generator) for index, shape in enumerate(shapes)}


def _gradients(step: int, scale: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(10 + step)
    return {name: scale * torch.randn(value.shape, generator=generator) for name, value in _model().items()}


@pytest.mark.parametrize("scale", [0.01, 1.0, 1e4])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_clipping_equals_torchs_own(momentum: float, scale: float) -> None:
    plain = {name: torch.nn.Parameter(value) for name, value in _model().items()}
    optimizer = torch.optim.SGD(plain.values(), lr=0.1, momentum=momentum)
    fleet = Fleet(_model(), OptimizerConfig(lr=0.1, momentum=momentum, clip_grad_norm=2.0), num_servers=2)
    for step in range(3):
        for name, gradient in _gradients(step, scale).items():
            plain[name].grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(plain.values(), 2.0)
        optimizer.step()
        commit = fleet.step(_gradients(step, scale))
        assert commit.grad_norm == pytest.approx(float(norm), rel=1e-6)
        for name, value in fleet.state().values.items():
            torch.testing.assert_close(value, plain[name].data, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_clipping_gives_the_same_bits_for_any_number_of_servers(on_nan: str) -> None:
    states, norms = [], []
    for num_servers in (1, 2, 3, 5):
        config = OptimizerConfig(lr=0.1, momentum=0.9, clip_grad_norm=2.0, on_nan=on_nan)  # type: ignore[arg-type]
        fleet = Fleet(_model(), config, num_servers=num_servers)
        norms.append([fleet.step(_gradients(step, 3.0)).grad_norm for step in range(3)])
        states.append(dict(fleet.state().values))
    assert all(norm == norms[0] for norm in norms)
    assert all(bits_equal(state, states[0]) for state in states)


def test_a_small_norm_leaves_the_gradient_alone() -> None:
    clipped = Fleet(_model(), OptimizerConfig(lr=0.1, clip_grad_norm=1e6))
    free = Fleet(_model(), OptimizerConfig(lr=0.1))
    clipped.step(_gradients(0, 1.0))
    free.step(_gradients(0, 1.0))
    assert bits_equal(dict(clipped.state().values), dict(free.state().values))


def test_the_vote_adds_in_key_order_whoever_reports_first() -> None:
    config = OptimizerConfig(clip_grad_norm=1.0)
    pieces = [(0, 0, "a", 1.0), (0, 64, "a", 2.0**-53), (128, 128, "b", 2.0**-53), (192, 192, "c", 1e-3)]
    one = decide([Report(0, 0, tuple(pieces))], config)
    for cut in range(len(pieces)):
        shares = [Report(0, 0, tuple(pieces[cut:][::-1])), Report(1, 0, tuple(pieces[:cut]))]
        assert decide(shares, config) == decide(shares[::-1], config) == one
    assert one.norm == math.sqrt(((1.0 + 2.0**-53) + 2.0**-53) + 1e-3)
    assert one.scale == 1.0 / (one.norm + 1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_vote_names_the_first_key_in_key_order(value: float) -> None:
    reports = [Report(0, 0, ((128, 128, "b", value),)), Report(1, 0, ((0, 0, "z", 1.0), (64, 64, "a", value)))]
    decision = decide(reports, OptimizerConfig(on_nan="skip"))
    assert (decision.apply, decision.key) == (False, "a")
