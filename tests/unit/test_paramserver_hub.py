"""The server side of shared memory: who may come in, who does not read, who leaves. The contract has its own test."""

import socket
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from paramserver.arena import Arena
from paramserver.client import Client
from paramserver.config import OptimizerConfig
from paramserver.errors import NonFiniteGradient, PartitionMismatch, ServerLost, StepTimeout
from paramserver.server import Server
from paramserver.server_memory import ServerMemory
from paramserver.transport.channel import connect
from paramserver.transport.hub import Hub
from paramserver.transport.shared_memory import SharedMemoryTransport
from paramserver.transport.versions import VersionsArena
from tests.support.servers import TIMEOUT_S, Fleet, rows_of


@pytest.fixture
def fleet() -> Fleet:
    values = {"a": torch.arange(300.0), "b": torch.ones(7)}
    return Fleet(values, OptimizerConfig(lr=1.0, momentum=0.5), num_microbatches=2, slice_bytes=512)


@pytest.fixture
def hub(fleet: Fleet) -> Iterator[Hub]:
    versions = VersionsArena.create(fleet.partition)
    memory = ServerMemory(fleet.partition, 0, fleet.optimizer, 2, fleet.initial, versions.vectors)
    server = Server(0, fleet.partition, fleet.optimizer, 2, fleet.initial, memory=memory)
    hub = Hub(server, versions, threads=3, least_elements=1)
    yield hub
    hub.close()


@pytest.fixture
def join(fleet: Fleet, hub: Hub) -> Iterator[Callable[..., Client]]:
    """Makes clients, and closes them."""
    clients: list[Client] = []

    def new(worker: int = 0, timeout_s: float = TIMEOUT_S) -> Client:
        transport = SharedMemoryTransport({0: hub.address}, fleet.partition)
        clients.append(Client(worker, fleet.partition, transport, timeout_s))
        return clients[-1]

    yield new
    for client in clients:
        client.close()


Join = Callable[..., Client]


def _push(fleet: Fleet, client: Client, step: int, vector: torch.Tensor | None = None) -> None:
    client.push(step, fleet.root, fleet.flatten({}) if vector is None else vector, rows_of(fleet.root), {})


def test_a_vector_from_allocate_is_read_where_it_lies(fleet: Fleet, join: Join) -> None:
    client = join()
    vector = client.allocate()
    for step in range(3):
        vector.fill_(float(step + 1))
        _push(fleet, client, step, vector)
        client.wait(step + 1)
    transport = client._transport
    assert isinstance(transport, SharedMemoryTransport)
    assert len(transport._arenas) == 1, "nothing was copied into another arena"
    read = client.read(3)
    assert read is not None
    wanted = Fleet({"a": torch.arange(300.0)}, fleet.optimizer, num_microbatches=2)
    for step in range(3):
        wanted.step({"a": torch.full((300,), float(step + 1))})
    assert torch.equal(fleet.partition.unflatten(read[0])["a"], wanted.state().values["a"])


def test_copied_tensors_reuse_their_arenas(fleet: Fleet, join: Join) -> None:
    client = join()
    for step in range(4):
        _push(fleet, client, step)
        client.wait(step + 1)
    assert isinstance(client._transport, SharedMemoryTransport)
    assert len(client._transport._arenas) == len(fleet.partition.slices)


def test_slices_can_be_read_before_the_commit(fleet: Fleet, join: Join) -> None:
    pushing, waiting = join(), join(1)
    first, *others = fleet.partition.slices
    gradient = fleet.flatten({"a": torch.ones(300), "b": torch.ones(7)})
    pushing.push(0, fleet.root, gradient, rows_of(fleet.root), {}, only=[first])
    waiting.await_slices(1, [first])
    read = waiting.vector(1)
    assert read is not None
    assert torch.equal(read[:128], torch.arange(128.0) - 0.5), "two samples, learning rate 1"
    with pytest.raises(StepTimeout, match=r"step 1: server 0 waits for microbatches \[0, 1\]"):
        join(2, timeout_s=0.0).await_slices(1, others)
    pushing.push(0, fleet.root, gradient, rows_of(fleet.root), {}, only=others)
    waiting.await_slices(1, others)
    assert waiting.wait(1).version == 1


def test_who_does_not_know_the_token_is_turned_away(fleet: Fleet, hub: Hub, join: Join) -> None:
    name, token = hub.address
    stranger = connect((name, bytes(len(token))), 5.0)
    with pytest.raises(EOFError):
        stranger.receive(5.0)
    stranger.close()
    _push(fleet, join(), 0)


def test_who_hangs_up_at_once_does_no_harm(fleet: Fleet, hub: Hub, join: Join) -> None:
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(hub.address[0])
    connect(hub.address, 5.0).close()
    client = join()
    _push(fleet, client, 0)
    assert client.wait(1).version == 1


def test_a_worker_that_does_not_read_holds_nobody_up(fleet: Fleet, join: Join) -> None:
    """Commits of thousands of steps do not fit into its socket; when it reads again, it hears of the last."""
    asleep, client = join(1), join()
    steps = 1500
    vector = client.allocate()
    for step in range(steps):
        _push(fleet, client, step, vector)
        client.wait(step + 1)
    assert asleep.wait(steps).version == steps


def test_a_worker_that_leaves_takes_nothing_with_it(fleet: Fleet, join: Join) -> None:
    leaving, client = join(1), join()
    _push(fleet, leaving, 0)
    leaving.close()
    assert client.wait(1).version == 1


def test_a_failure_is_told_to_those_who_come_later(fleet: Fleet, join: Join) -> None:
    client = join()
    _push(fleet, client, 0, torch.full((fleet.partition.length,), torch.nan))
    with pytest.raises(NonFiniteGradient):
        client.wait(1)
    with pytest.raises(NonFiniteGradient):
        join(1).wait(1)


def test_a_server_that_is_gone_is_named(hub: Hub, join: Join) -> None:
    client = join()
    hub.close()
    with pytest.raises(ServerLost, match="server 0 is gone"):
        client.wait(1)
    with pytest.raises(ServerLost, match="server 0 is gone"):
        join()


def test_calls_run_in_the_hubs_thread(hub: Hub) -> None:
    assert hub.call(threading.current_thread).result(TIMEOUT_S) is not threading.current_thread()
    with pytest.raises(ZeroDivisionError):
        hub.call(lambda: 1 // 0).result(TIMEOUT_S)


def test_memory_that_was_not_attached_is_refused(fleet: Fleet, hub: Hub) -> None:
    transport = SharedMemoryTransport({0: hub.address}, fleet.partition)
    vector = transport.allocate(fleet.partition.length)
    # As if it had made another arena first: the one that the server knows is not the one it speaks of.
    transport._arenas.insert(0, Arena.create(64))
    transport._starts.insert(0, 0)
    client = Client(0, fleet.partition, transport, TIMEOUT_S)
    _push(fleet, client, 0, vector)
    with pytest.raises(PartitionMismatch, match="names memory that it did not attach"):
        client.wait(1)
    client.close()
