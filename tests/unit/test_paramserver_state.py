"""A state by key: assembled from any number of servers, it goes on with any other number to the same bits."""

from typing import Any

import pytest
import torch
from torch import Tensor

from paramserver.config import OptimizerConfig
from paramserver.errors import ReplicaMismatch
from paramserver.fingerprint import fingerprint
from paramserver.state import State, assemble
from tests.support.servers import Fleet, bits_equal

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1},
    "sgd momentum": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
    "adam": {"name": "adam", "lr": 0.01, "weight_decay": 1e-2},
    "adamw": {"name": "adamw", "lr": 0.01},
}
BUFFER = "bn.mean"


def _values(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "conv": torch.randn(8, 5, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last),
        "scalar": torch.randn((), generator=generator),
        "large": torch.randn(37, 11, generator=generator),
        "head": torch.randn(9, generator=generator),
        BUFFER: torch.randn(70, generator=generator),
    }


def _fleet(settings: dict[str, Any], num_servers: int, state: State | None = None, slice_bytes: int = 256) -> Fleet:
    config = OptimizerConfig(**settings, lr_factors=(("head", 10.0),))
    return Fleet(
        _values(),
        config,
        num_servers=num_servers,
        slice_bytes=slice_bytes,
        buffers=[BUFFER],
        integers={"seen": torch.tensor(0)},
        state=state,
    )


def _train(fleet: Fleet, steps: int) -> None:
    for _ in range(steps):
        version = fleet.servers[0].version
        fleet.step(_values(100 + version), integers={"seen": torch.tensor(version + 1)})


def _optimizer_bits(state: State) -> dict[str, Tensor]:
    return {f"{key}.{name}": value for key, held in state.optimizer.items() for name, value in held.items()}


@pytest.mark.parametrize("settings", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize(("servers_before", "servers_after", "slice_bytes"), [(1, 3, 256), (3, 2, 256), (2, 1, 1024)])
@pytest.mark.parametrize("cut_at", [0, 3, 4])
def test_it_goes_on_with_another_number_of_servers(
    settings: dict[str, Any], servers_before: int, servers_after: int, slice_bytes: int, cut_at: int
) -> None:
    undisturbed = _fleet(settings, 1)
    _train(undisturbed, 6)
    before = _fleet(settings, servers_before)
    _train(before, cut_at)
    state = before.state()
    assert state.version == cut_at
    after = _fleet(settings, servers_after, state, slice_bytes)
    assert bits_equal(_optimizer_bits(after.state()), _optimizer_bits(state))
    _train(after, 6 - cut_at)
    assert fingerprint(after.state().state_dict()) == fingerprint(undisturbed.state().state_dict())
    assert bits_equal(_optimizer_bits(after.state()), _optimizer_bits(undisturbed.state()))
    assert after.state().integers["seen"] == 6


@pytest.mark.parametrize("settings", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_optimizer_state_has_the_shapes_of_its_keys_and_torchs_own_values(settings: dict[str, Any]) -> None:
    fleet = _fleet({**settings, "weight_decay": 0.0}, 2)
    _train(fleet, 3)
    state = fleet.state()
    names = {"sgd": set(), "adam": {"step", "exp_avg", "exp_avg_sq"}, "adamw": {"step", "exp_avg", "exp_avg_sq"}}
    expected = {"momentum_buffer"} if settings.get("momentum") else names[settings.get("name", "sgd")]
    assert state.optimizer.keys() == ({"conv", "scalar", "large", "head"} if expected else set())
    for key, held in state.optimizer.items():
        assert held.keys() == expected
        for name, value in held.items():
            assert value.shape == (() if name == "step" else _values()[key].shape)
    if "exp_avg" not in expected:
        return
    for key, held in state.optimizer.items():
        average = torch.zeros_like(_values()[key])
        for step in range(3):
            average.lerp_(_values(100 + step)[key], 0.1)
        assert held["step"] == 3
        torch.testing.assert_close(held["exp_avg"], average, rtol=1e-5, atol=1e-7)


def test_a_channels_last_key_is_given_by_its_logical_places() -> None:
    """With SGD's first step, the momentum is the gradient: whatever the memory order, place by place."""
    fleet = _fleet({"lr": 0.1, "momentum": 0.9}, 3)
    _train(fleet, 1)
    state = fleet.state()
    assert torch.equal(state.optimizer["conv"]["momentum_buffer"], _values(100)["conv"])
    assert state.values["conv"].stride() == _values()["conv"].stride()
    # The same state, loaded into a model that is not channels-last, goes on to the same values.
    plain = Fleet(
        {name: value.contiguous() for name, value in _values().items()},
        fleet.optimizer,
        buffers=[BUFFER],
        integers={"seen": torch.tensor(0)},
        state=state,
    )
    _train(plain, 2)
    _train(fleet, 2)
    assert fingerprint(plain.state().state_dict()) == fingerprint(fleet.state().state_dict())


def test_assembled_tensors_are_copies() -> None:
    fleet = _fleet({"lr": 0.1, "momentum": 0.9}, 2)
    _train(fleet, 1)
    state = fleet.state()
    wanted = fingerprint(fleet.state().state_dict()), _optimizer_bits(fleet.state())
    for value in (*state.values.values(), *state.integers.values(), *_optimizer_bits(state).values()):
        value.fill_(9)
    assert fingerprint(fleet.state().state_dict()) == wanted[0]
    assert bits_equal(_optimizer_bits(fleet.state()), wanted[1])


def test_the_initial_state_is_not_written() -> None:
    values = _values()
    integers = {"seen": torch.tensor(0)}
    fleet = Fleet(values, OptimizerConfig(lr=1.0), buffers=[BUFFER], integers=integers)
    _train(fleet, 3)
    assert bits_equal(values, _values())
    assert integers["seen"] == 0


def test_frozen_keys_and_integers_are_part_of_the_state_dict_and_lie_on_server_0() -> None:
    state = State(
        version=5,
        values=_values(),
        integers={"seen": torch.tensor(4)},
        constants={"backbone.weight": torch.randn(2, 2, dtype=torch.float64)},
    )
    fleet = _fleet({"lr": 0.1}, 3, state)
    again = fleet.state()
    assert again.version == 5
    assert fingerprint(again.state_dict()) == fingerprint(state.state_dict())
    hellos = [server.hello() for server in fleet.servers]
    assert [list(hello.constants) for hello in hellos] == [["backbone.weight"], [], []]
    assert [list(server.integers(5)) for server in fleet.servers] == [["seen"], [], []]
    assert fleet.client().constants.keys() == {"backbone.weight"}


def test_shares_of_different_versions_are_no_state() -> None:
    fleet = _fleet({"lr": 0.1}, 2)
    fleet.servers[0].hold(0)
    old = fleet.servers[0].snapshot(0)
    _train(fleet, 1)
    with pytest.raises(ReplicaMismatch, match=r"versions \[0, 1\]"):
        assemble(fleet.partition, [old, fleet.servers[1].snapshot(1)])
