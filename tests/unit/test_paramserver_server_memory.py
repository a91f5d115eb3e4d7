"""What a server has committed outlives it: another one goes on from its memory, to the same bits."""

from typing import Any

import pytest
import torch
from torch import Tensor

from paramserver.config import OptimizerConfig
from paramserver.errors import PartitionMismatch, StaleContribution, VersionGone
from paramserver.integers import IntegerBlock
from paramserver.messages import Commit, pack_commit
from paramserver.reduction import Node
from paramserver.server import Server
from paramserver.server_memory import CHUNK, ServerMemory
from paramserver.state import State
from paramserver.vote import decide
from tests.support.servers import Fleet, bits_equal

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
    "adam": {"name": "adam", "lr": 0.01},
    "adamw": {"name": "adamw", "lr": 0.01, "weight_decay": 1e-2},
    "with a vote": {"lr": 0.1, "momentum": 0.9, "clip_grad_norm": 0.5},
}
every_optimizer = pytest.mark.parametrize("settings", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def _values(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(300, generator=generator), "mean": torch.randn(5, generator=generator)}


def _fleet(settings: dict[str, Any], **more: Any) -> Fleet:
    integers = {"seen": torch.tensor(0)}
    return Fleet(_values(0), OptimizerConfig(**settings), buffers=["mean"], integers=integers, **more)


def _replace(fleet: Fleet, index: int = 0, generation: int = 0) -> None:
    """As if the server's process had died: a new one has its memory and nothing else."""
    old = fleet.servers[index]
    fleet.servers[index] = fleet.group.servers[index] = Server(
        index,
        fleet.partition,
        fleet.optimizer,
        fleet.num_microbatches,
        fleet.initial,
        memory=ServerMemory(
            fleet.partition,
            index,
            fleet.optimizer,
            fleet.num_microbatches,
            fleet.initial,
            old.memory.vectors,
            old.memory._content,
        ),
        generation=generation,
    )


def _floats(state: State) -> dict[str, Tensor]:
    """Everything; whole numbers as floats, which is exact for small ones."""
    return {name: value.float() for name, value in state.everything().items()}


def _step(fleet: Fleet, step: int) -> Commit:
    return fleet.step(_values(100 + step), integers={"seen": torch.tensor(step + 1)})


@every_optimizer
@pytest.mark.parametrize("num_servers", [1, 2])
def test_a_server_that_is_replaced_after_any_step_gives_the_same_bits(
    settings: dict[str, Any], num_servers: int
) -> None:
    undisturbed, replaced = (_fleet(settings, num_servers=num_servers) for _ in range(2))
    for step in range(5):
        for index in range(num_servers):
            _replace(replaced, index)
        assert _step(undisturbed, step)._replace(server_ms={}) == _step(replaced, step)._replace(server_ms={})
        assert bits_equal(_floats(undisturbed.state()), _floats(replaced.state())), f"after step {step + 1}"


@every_optimizer
def test_a_half_written_version_is_written_again(settings: dict[str, Any]) -> None:
    undisturbed, replaced = (_fleet(settings) for _ in range(2))
    for fleet in (undisturbed, replaced):
        _step(fleet, 0)
    server = replaced.servers[0]
    server.push(replaced.push(1, replaced.root, _values(7), integers={"seen": torch.tensor(9)}))
    server.vote(lambda report: decide([report], server.config))
    for index, part in server.ready_parts()[:3]:
        server.update_part(index, part)
    _replace(replaced)
    for fleet in (undisturbed, replaced):
        _step(fleet, 1)
    assert bits_equal(_floats(undisturbed.state()), _floats(replaced.state()))


def test_what_a_server_said_last_is_said_again() -> None:
    fleet = _fleet(OPTIMIZERS["with a vote"])
    assert fleet.servers[0].last is None
    _replace(fleet)
    assert fleet.servers[0].last is None, "the run has only started"
    commit = _step(fleet, 0)
    _replace(fleet)
    assert fleet.servers[0].last == commit
    assert fleet.servers[0].hello().last == commit
    assert commit.decision is not None
    assert commit.decision.scale < 1


def test_both_versions_can_be_read_until_the_next_update() -> None:
    fleet = _fleet(OPTIMIZERS["momentum"])
    _step(fleet, 0)
    first = [value.clone() for value in fleet.servers[0].values(1)]
    _step(fleet, 1)
    _replace(fleet)
    server = fleet.servers[0]
    assert all(map(torch.equal, server.values(1), first))
    assert int(server.integers(1)["seen"]) == 1
    server.push(fleet.push(2, fleet.root, _values(3), integers={"seen": torch.tensor(3)}))
    assert server.readable(1), "nothing is overwritten yet"
    server.update_part(*server.ready_parts()[0])
    with pytest.raises(VersionGone):
        server.values(1)


def test_a_new_membership_forgets_what_was_pushed_and_refuses_the_old_one() -> None:
    fleet = _fleet(OPTIMIZERS["momentum"], num_microbatches=2)
    server = fleet.servers[0]
    left, right = (fleet.push(0, Node(lo, lo + 1), _values(lo)) for lo in range(2))
    server.push(left)
    server.regroup(1)
    assert server.missing() == [0, 1]
    with pytest.raises(StaleContribution, match="generation 0"):
        server.push(right)
    for push in (left, right):
        server.push(push._replace(generation=1))
    server.update()
    assert server.commit().generation == 1


def test_a_repetition_for_a_server_that_is_ahead_is_answered() -> None:
    """Where one server had committed and another had not, the step is pushed again to both."""
    fleet = _fleet(OPTIMIZERS["momentum"], num_servers=2)
    server = fleet.servers[0]
    push = fleet.push(0, fleet.root, _values(1), integers={"seen": torch.tensor(1)})
    server.push(push)
    server.update()
    server.commit()
    before = [value.clone() for value in server.values(1)]
    server.regroup(1)
    server.push(push._replace(generation=1))
    assert server.missing() == [0], "the next step has nothing"
    assert all(map(torch.equal, server.values(1), before))


def test_memory_of_other_parameters_is_refused() -> None:
    fleet, other = _fleet(OPTIMIZERS["sgd"]), Fleet({"w": torch.zeros(300)})
    left = fleet.servers[0].memory
    with pytest.raises(PartitionMismatch, match="of other parameters"):
        ServerMemory(other.partition, 0, other.optimizer, 1, other.initial, left.vectors, left._content)


def test_a_record_is_of_its_own_version() -> None:
    fleet = _fleet(OPTIMIZERS["sgd"])
    memory = fleet.servers[0].memory
    assert memory.version == 0
    assert memory.record(-1) is None
    assert memory.record(1) is None
    memory.commit(1, pack_commit(Commit(1, (), 0.5), IntegerBlock.pack({"seen": torch.tensor(4)})))
    assert memory.version == 1
    kept = memory.record(1)
    assert kept is not None
    assert kept[0].lr == 0.5
    assert int(kept[1]["seen"]) == 4


def test_a_slice_of_several_chunks_has_state_for_each() -> None:
    fleet = Fleet({"w": torch.zeros(CHUNK + 64)}, OptimizerConfig(momentum=0.9), slice_bytes=8 * CHUNK)
    (piece,) = fleet.partition.slices
    chunks = fleet.servers[0].memory.chunks(piece)
    assert [chunk.vectors[0]["momentum_buffer"].numel() for chunk in chunks] == [CHUNK, 64]
    addresses = {chunk.vectors[half]["momentum_buffer"].data_ptr() for chunk in chunks for half in range(2)}
    assert len(addresses) == 4
    assert all(address % 64 == 0 for address in addresses)
