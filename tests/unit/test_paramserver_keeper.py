"""A keeper has a server's memory open: who goes on after the server finds it as it was committed."""

from collections.abc import Iterator

import pytest
import torch

from paramserver.arena import Arena
from paramserver.config import OptimizerConfig
from paramserver.errors import ServerLost
from paramserver.server import Server
from paramserver.server_memory import ServerMemory
from paramserver.transport.hub import Hub
from paramserver.transport.keeper import Keeper, claim
from paramserver.transport.shared_memory import SharedMemoryTransport
from paramserver.transport.versions import VersionsArena
from tests.support.servers import TIMEOUT_S, Fleet, rows_of


@pytest.fixture
def fleet() -> Fleet:
    return Fleet({"w": torch.arange(300.0)}, OptimizerConfig(lr=1.0, momentum=0.5), slice_bytes=512)


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    keeper = Keeper()
    yield keeper
    keeper.close()


def _hub(fleet: Fleet, versions: VersionsArena, own: Arena, generation: int = 0) -> Hub:
    about = (fleet.optimizer, fleet.num_microbatches, fleet.initial)
    content = own.tensor(0, own.num_bytes, torch.uint8)
    memory = ServerMemory(fleet.partition, 0, *about, versions.vectors, content)
    return Hub(Server(0, fleet.partition, *about, memory=memory, generation=generation), versions, own=own)


def _start(fleet: Fleet) -> Hub:
    size = ServerMemory.num_bytes(fleet.partition, 0, fleet.optimizer, fleet.num_microbatches, fleet.initial)
    return _hub(fleet, VersionsArena.create(fleet.partition), Arena.create(size))


def _train(fleet: Fleet, hub: Hub, steps: range) -> None:
    from paramserver.client import Client

    client = Client(0, fleet.partition, SharedMemoryTransport({0: hub.address}, fleet.partition), TIMEOUT_S)
    for step in steps:
        client.push(step, fleet.root, fleet.flatten({"w": torch.full((300,), step + 1.0)}), rows_of(fleet.root), {})
        client.wait(step + 1)
    client.close()


def test_another_server_goes_on_from_what_was_kept(fleet: Fleet, keeper: Keeper) -> None:
    hub = _start(fleet)
    keeper.keep(0, hub.address)
    _train(fleet, hub, range(2))
    hub.close()
    del hub
    kept = claim(0, keeper.address)
    after = _hub(fleet, VersionsArena(kept.versions, fleet.partition), kept.own, generation=1)
    assert after.last is not None
    assert after.last.version == 2
    _train(fleet, after, range(2, 4))
    found = after.call(lambda: after._server.snapshot(4)).result(TIMEOUT_S)  # type: ignore[attr-defined]
    after.close()
    for step in range(4):
        fleet.step({"w": torch.full((300,), step + 1.0)})
    want = fleet.servers[0].snapshot(4)
    for index, held in want.slices.items():
        assert torch.equal(found.slices[index].values, held.values)
        assert torch.equal(found.slices[index].optimizer["momentum_buffer"], held.optimizer["momentum_buffer"])


def test_what_nobody_has_kept_is_said(keeper: Keeper) -> None:
    with pytest.raises(ServerLost, match="nobody has kept the memory of server 3"):
        claim(3, keeper.address)


def test_a_keeper_that_is_gone_and_a_hub_that_is_gone_are_said(fleet: Fleet, keeper: Keeper) -> None:
    hub = _start(fleet)
    hub.close()
    with pytest.raises(ServerLost, match="server 0 is gone"):
        keeper.keep(0, hub.address)
    keeper.close()
    with pytest.raises(ServerLost, match="gone with its keeper"):
        claim(0, keeper.address)
