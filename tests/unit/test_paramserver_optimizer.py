"""Cut into slices, the optimizer does to the bit what ``torch.optim`` does to whole tensors."""

from typing import Any

import pytest
import torch
from torch import Tensor

from paramserver.config import OptimizerConfig
from paramserver.optimizer import SliceOptimizer, build_slice_optimizer
from paramserver.server_memory import ServerMemory
from tests.support.servers import Fleet, bits_equal, rows_of

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1},
    "sgd weight decay": {"lr": 0.1, "weight_decay": 5e-4},
    "sgd momentum": {"lr": 0.1, "momentum": 0.9},
    "sgd nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
    "adam": {"name": "adam", "lr": 0.01},
    "adam weight decay": {"name": "adam", "lr": 0.01, "weight_decay": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6},
    "adamw": {"name": "adamw", "lr": 0.01, "weight_decay": 1e-2},
}
every_optimizer = pytest.mark.parametrize("settings", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def _model(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = {
        "conv": torch.randn(8, 5, 3, 3, generator=generator),
        "scalar": torch.randn((), generator=generator),
        "one": torch.randn(1, generator=generator),
        "odd": torch.randn(13, 7, generator=generator),
        "large": torch.randn(1001, generator=generator),
    }
    values["conv"] = values["conv"].contiguous(memory_format=torch.channels_last)
    return values


def _plain_optimizer(settings: dict[str, Any], parameters: list[Tensor]) -> torch.optim.Optimizer:
    options = {name: value for name, value in settings.items() if name != "name"}
    cls = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.get("name", "sgd")]
    return cls(parameters, foreach=False, fused=False, **options)


@every_optimizer
@pytest.mark.parametrize("slice_bytes", [256, 1 << 20])
def test_slices_equal_torch_optim_on_whole_tensors(settings: dict[str, Any], slice_bytes: int) -> None:
    plain = {name: value.clone() for name, value in _model().items()}
    optimizer = _plain_optimizer(settings, list(plain.values()))
    fleet = Fleet(_model(), OptimizerConfig(**settings), num_servers=2, slice_bytes=slice_bytes)
    for step in range(5):
        gradients = _model(seed=100 + step)
        for name, value in plain.items():
            value.grad = gradients[name].clone()
        optimizer.step()
        fleet.step(gradients)
        assert bits_equal(dict(fleet.state().values), plain), f"after step {step + 1}"


@every_optimizer
def test_a_sum_is_divided_first(settings: dict[str, Any]) -> None:
    """By a number that leaves nothing as it is: (sum / weight), rounded, is the gradient."""
    plain = {name: value.clone() for name, value in _model().items()}
    optimizer = _plain_optimizer(settings, list(plain.values()))
    fleet = Fleet(_model(), OptimizerConfig(**settings), slice_bytes=512)
    for step in range(5):
        sums = _model(seed=100 + step)
        for name, value in plain.items():
            value.grad = sums[name] / torch.tensor(7.0)
        optimizer.step()
        fleet.step(sums, stats=rows_of(fleet.root, weight=7.0))
        assert bits_equal(dict(fleet.state().values), plain), f"after step {step + 1}"


def _slice(settings: dict[str, Any], **changes: Any) -> tuple[tuple[Tensor, Tensor], SliceOptimizer]:
    start = torch.randn(128, generator=torch.Generator().manual_seed(1))
    values = (start, start.clone())
    return values, _build(values, settings, **changes)


def _build(values: tuple[Tensor, Tensor], settings: dict[str, Any], **changes: Any) -> SliceOptimizer:
    config = OptimizerConfig(**settings)
    fleet = Fleet({"w": values[0]}, config, slice_bytes=512)
    memory = ServerMemory(fleet.partition, 0, config, 1, fleet.initial)
    return build_slice_optimizer(values, memory.chunks(fleet.partition.slices[0])[0], config, **changes)


def _gradient(step: int) -> Tensor:
    return torch.randn(128, generator=torch.Generator().manual_seed(50 + step))


def _copy(optimizer: SliceOptimizer, values: tuple[Tensor, Tensor], version: int) -> dict[str, Tensor]:
    state = {name: value.clone() for name, value in optimizer.state(version).items()}
    return {"values": values[version % 2].clone(), **state}


@every_optimizer
def test_a_step_never_touches_the_version_that_it_reads(settings: dict[str, Any]) -> None:
    values, optimizer = _slice(settings)
    for version in range(4):
        before = _copy(optimizer, values, version)
        gradient = _gradient(version)
        optimizer.step(version, gradient, settings["lr"])
        assert bits_equal(_copy(optimizer, values, version), before)
        assert not torch.equal(values[(version + 1) % 2], before["values"])


@every_optimizer
def test_a_step_can_be_taken_again_from_the_same_version(settings: dict[str, Any]) -> None:
    """What a server that failed between its slices does: the second attempt must not see traces of the first."""
    values, optimizer = _slice(settings)
    for version in range(3):
        optimizer.step(version, torch.full((128,), 1e3), settings["lr"])
        optimizer.step(version, _gradient(version), settings["lr"])
    again, undisturbed = _slice(settings)
    for version in range(3):
        undisturbed.step(version, _gradient(version), settings["lr"])
    assert bits_equal(_copy(optimizer, values, 3), _copy(undisturbed, again, 3))


@every_optimizer
def test_a_skipped_step_copies_values_and_state(settings: dict[str, Any]) -> None:
    values, optimizer = _slice(settings)
    optimizer.skip(0)
    assert bits_equal(_copy(optimizer, values, 1), _copy(optimizer, values, 0))
    optimizer.step(1, _gradient(0), settings["lr"])
    optimizer.skip(2)
    assert bits_equal(_copy(optimizer, values, 3), _copy(optimizer, values, 2))
    optimizer.step(3, _gradient(1), settings["lr"])

    plain, undisturbed = _slice(settings)
    undisturbed.step(0, _gradient(0), settings["lr"])
    undisturbed.step(1, _gradient(1), settings["lr"])
    assert bits_equal(_copy(optimizer, values, 4), _copy(undisturbed, plain, 2))


@every_optimizer
@pytest.mark.parametrize("loaded_at", [2, 3])
def test_state_goes_around(settings: dict[str, Any], loaded_at: int) -> None:
    values, optimizer = _slice(settings)
    for version in range(loaded_at):
        optimizer.step(version, _gradient(version), settings["lr"])
    kept = optimizer.state(loaded_at)
    vector = values[loaded_at % 2].clone()
    others = (vector, vector.clone())
    loaded = _build(others, settings)
    loaded.load_state(loaded_at, kept)
    assert bits_equal(loaded.state(loaded_at), kept)
    assert all(loaded.state(loaded_at)[name].data_ptr() != value.data_ptr() for name, value in kept.items())
    for version in range(loaded_at, loaded_at + 3):
        optimizer.step(version, _gradient(version), settings["lr"])
        loaded.step(version, _gradient(version), settings["lr"])
    assert bits_equal(_copy(loaded, others, loaded_at + 3), _copy(optimizer, values, loaded_at + 3))


def test_the_learning_rate_is_the_steps_times_the_groups_factor() -> None:
    values, optimizer = _slice({"lr": 1.0}, lr_factor=0.5)
    start = values[0].clone()
    optimizer.step(0, torch.ones(128), 0.25)
    torch.testing.assert_close(values[1], start - 0.125)
    fleet = Fleet(
        {"head.weight": torch.zeros(3), "body.weight": torch.zeros(3)},
        OptimizerConfig(lr=1.0, schedule="step", total_steps=6, decay_factor=0.5, lr_factors=(("head.*", 4.0),)),
    )
    lrs = [fleet.step({"head.weight": torch.ones(3), "body.weight": torch.ones(3)}).lr for _ in range(4)]
    assert lrs == [1.0, 1.0, 0.5, 0.5]
    assert torch.equal(fleet.state().values["body.weight"], torch.full((3,), -3.0))
    assert torch.equal(fleet.state().values["head.weight"], torch.full((3,), -12.0))


@every_optimizer
def test_all_optimizers_that_the_options_name_are_element_wise(settings: dict[str, Any]) -> None:
    """A slice alone must get the bits that it gets beside others: the reason why other optimizers are refused."""
    whole, both = _slice(settings)
    start = whole[0].clone()
    half = (start[:64].clone(), start[:64].clone())
    alone = _build(half, settings)
    for version in range(3):
        both.step(version, _gradient(version), settings["lr"])
        alone.step(version, _gradient(version)[:64], settings["lr"])
    assert torch.equal(half[1], whole[1][:64])
