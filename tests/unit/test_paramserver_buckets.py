"""Steps in buckets, several servers, and something that happens in the middle of every other step: drawn at random.

Whatever it is, each version has the bits of a run that one server took by the interpreter, undisturbed.
"""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from paramserver.client import Client
from paramserver.config import OptimizerConfig
from paramserver.errors import VersionGone
from paramserver.partition import Slice
from paramserver.reduction import Node
from paramserver.server import Server
from paramserver.server_memory import ServerMemory
from paramserver.transport.hub import Hub
from paramserver.transport.shared_memory import SharedMemoryTransport
from paramserver.transport.versions import VersionsArena
from paramserver.transport.wire import AskMissing
from tests.support.servers import TIMEOUT_S, Fleet, bits_equal, rows_of

M = 4
NODES = [Node(index, index + 1) for index in range(M)]
STEPS, UNDISTURBED = 14, 4
OPTIMIZERS = {
    "sgd": OptimizerConfig(lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": OptimizerConfig(name="adamw", lr=0.01, weight_decay=0.1),
}


class Cluster:
    """Servers on memory that outlives them, and workers, all in this process."""

    def __init__(self, optimizer: OptimizerConfig, num_servers: int, *, foretell: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)
        values = {
            "conv": torch.randn(40, 33, generator=generator),
            "bias": torch.randn(7, generator=generator),
            "bn.mean": torch.randn(5, generator=generator),
        }
        self.optimizer, self.foretell = optimizer, foretell
        self.fleet = Fleet(
            values,
            optimizer,
            num_microbatches=M,
            num_servers=num_servers,
            slice_bytes=512,
            buffers=["bn.mean"],
            integers={"seen": torch.tensor(0)},
        )
        self.versions = VersionsArena.create(self.fleet.partition)
        self.contents = [
            torch.zeros(ServerMemory.num_bytes(*self._about(index)), dtype=torch.uint8) for index in range(num_servers)
        ]
        self.generation = 0
        self.start()
        self.join()

    def _about(self, server: int) -> tuple[object, ...]:
        return self.fleet.partition, server, self.optimizer, M, self.fleet.initial

    def start(self) -> None:
        """Servers that go on from what stands in the memory."""
        self.servers = [
            Server(
                index,
                self.fleet.partition,
                self.optimizer,
                M,
                self.fleet.initial,
                memory=ServerMemory(*self._about(index), self.versions.vectors, content),  # type: ignore[arg-type]
                generation=self.generation,
            )
            for index, content in enumerate(self.contents)
        ]
        self.hubs = [Hub(server, self.versions, threads=2, foretell=self.foretell) for server in self.servers]

    def join(self) -> None:
        """All workers, on new connections."""
        self.clients = [self.client(worker) for worker in range(M)]
        self.vectors = [client.allocate() for client in self.clients]

    def client(self, worker: int) -> Client:
        addresses = {index: hub.address for index, hub in enumerate(self.hubs)}
        transport = SharedMemoryTransport(addresses, self.fleet.partition)
        return Client(worker, self.fleet.partition, transport, TIMEOUT_S)

    def fill(self, step: int) -> None:
        for worker, vector in enumerate(self.vectors):
            vector.copy_(torch.randn(vector.shape, generator=torch.Generator().manual_seed(100 * step + worker)))

    def push(self, step: int, worker: int, only: list[Slice] | None = None) -> None:
        rows = rows_of(NODES[worker], weight=3.0 + worker, samples=2 + worker, loss=0.1 * step + worker)
        seen = {"seen": torch.tensor(step + 1)}
        self.clients[worker].push(step, NODES[worker], self.vectors[worker], rows, seen, only)

    def ask(self, server: int, function: Callable[[Server], object]) -> object:
        """In the thread that owns the server."""
        return self.hubs[server].call(lambda: function(self.servers[server])).result(TIMEOUT_S)

    def regroup(self) -> None:
        """All members come again."""
        self.generation += 1
        for hub in self.hubs:
            hub.call(lambda hub=hub: hub.regroup(self.generation)).result(TIMEOUT_S)  # type: ignore[misc]
        for client in self.clients:
            client.close()
        self.join()

    def crash(self) -> None:
        """All processes are gone at this instant; others go on from the memory."""
        memory = [vector.clone() for vector in self.versions.vectors]
        self.contents = [content.clone() for content in self.contents]
        self.close()
        self.versions = VersionsArena.create(self.fleet.partition)
        for vector, kept in zip(self.versions.vectors, memory, strict=True):
            vector.copy_(kept)
        self.generation += 1
        self.start()
        self.join()

    def version(self) -> int:
        """That all servers have."""
        return min(int(str(self.ask(index, lambda server: server.version))) for index in range(len(self.servers)))

    def state(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for server in range(len(self.servers)):
            snapshot = self.ask(server, lambda server: server.snapshot(server.version))
            for index, part in snapshot.slices.items():  # type: ignore[attr-defined]
                found[str(index)] = part.values
                found |= {f"{index}/{name}": value.reshape(-1) for name, value in part.optimizer.items()}
            integers = snapshot.integers  # type: ignore[attr-defined]
            found |= {name: value.reshape(-1).float() for name, value in integers.items()}
        return found

    def close(self) -> None:
        for client in self.clients:
            client.close()
        for hub in self.hubs:
            hub.close()


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, list[dict[str, Tensor]]]:
    """By optimizer the state of each version from 1 on."""
    found: dict[str, list[dict[str, Tensor]]] = {}
    for name, optimizer in OPTIMIZERS.items():
        cluster = Cluster(optimizer, 1, foretell=False)
        found[name] = []
        for step in range(STEPS):
            cluster.fill(step)
            for worker in range(M):
                cluster.push(step, worker)
            for client in cluster.clients:
                client.wait(step + 1)
            found[name].append({key: value.clone() for key, value in cluster.state().items()})
        cluster.close()
    return found


class Disturbed:
    """One run with what chance makes of it."""

    def __init__(self, seed: int) -> None:
        self.chance = chance = random.Random(seed)
        self.optimizer = chance.choice(list(OPTIMIZERS))
        self.cluster = Cluster(OPTIMIZERS[self.optimizer], chance.choice([1, 2, 3]))
        slices = list(self.cluster.fleet.partition.slices)
        chance.shuffle(slices)
        count = chance.choice([2, 3, 5, len(slices)])
        self.buckets = [sorted(slices[index::count], key=lambda piece: piece.index) for index in range(count)]
        self.watches = chance.random() < 0.6
        self.held: int | None = None

    def step(self, step: int) -> bool:
        """False if it is to be begun again, at the version that all servers have."""
        cluster, chance = self.cluster, self.chance
        cluster.fill(step)
        order = [worker for worker in range(M) for _ in self.buckets]
        chance.shuffle(order)
        at = chance.randrange(1, len(order)) if step >= UNDISTURBED and chance.random() < 0.6 else None
        sent = [0] * M
        shown = 0
        for number, worker in enumerate(order):
            if number == at and not self.disturb(step, sent):
                return False
            cluster.push(step, worker, self.buckets[sent[worker]])
            sent[worker] += 1
            while self.watches and self.held is None and shown < min(sent):
                cluster.clients[chance.randrange(M)].await_slices(step + 1, self.buckets[shown])
                shown += 1
        for client in cluster.clients:
            assert client.wait(step + 1).version == step + 1
        if self.held is not None:
            cluster.ask(self.held, lambda server: server.release(step))
            self.held = None
        return True

    def disturb(self, step: int, sent: list[int]) -> bool:
        """Something happens, between two pushes; False if nobody is there any more who has pushed."""
        cluster, chance = self.cluster, self.chance
        server, worker = chance.randrange(len(cluster.hubs)), chance.randrange(M)
        what = chance.choice(["call", "again", "whole", "ask", "join", "hold", "leave", "regroup", "crash"])
        if what == "call":
            cluster.ask(server, lambda _: None)
        elif what == "again" and sent[worker]:
            cluster.push(step, worker, self.buckets[chance.randrange(sent[worker])])
        elif what == "whole":
            cluster.push(step, worker)
        elif what == "ask":
            cluster.clients[worker]._transport._tell(server, AskMissing())  # type: ignore[attr-defined]
        elif what == "join":
            cluster.client(M).close()
        elif what == "hold":
            # A server of which something was overwritten has the version before no more, and says so.
            try:
                cluster.ask(server, lambda held: held.hold(step - 1))
                cluster.ask(server, lambda held: held.release(step - 1))
            except VersionGone:
                pass
            cluster.ask(server, lambda held: held.hold(step))
            self.held = server
        elif what == "leave":
            cluster.hubs[server].leave = True
            cluster.hubs[server].leave = False
        elif what == "regroup":
            cluster.regroup()
        elif what == "crash":
            cluster.crash()
        return what not in ("regroup", "crash")


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 60))])
def test_whatever_happens_in_the_middle_of_steps_their_bits_are_those_of_undisturbed_ones(
    undisturbed: dict[str, list[dict[str, Tensor]]], seed: int
) -> None:
    run = Disturbed(seed)
    try:
        step = 0
        while step < STEPS:
            if not run.step(step):
                step = run.cluster.version()
                continue
            step += 1
            assert bits_equal(run.cluster.state(), undisturbed[run.optimizer][step - 1])
    finally:
        run.cluster.close()


@pytest.mark.parametrize("ends", [Cluster.regroup, Cluster.crash])
def test_a_version_that_is_overwritten_in_part_is_gone_for_whoever_comes_then(ends: Callable[[Cluster], None]) -> None:
    cluster = Cluster(OPTIMIZERS["sgd"], 1)
    try:
        slices = list(cluster.fleet.partition.slices)
        for step in range(5):
            cluster.fill(step)
            for bucket in (slices[:3], slices[3:]):
                for worker in range(M):
                    cluster.push(step, worker, bucket)
            for client in cluster.clients:
                client.wait(step + 1)
        assert cluster.ask(0, lambda server: server.readable(4))
        cluster.fill(5)
        for worker in range(M):
            cluster.push(5, worker, slices[:3])
        cluster.clients[0].await_slices(6, slices[:3])
        ends(cluster)
        assert cluster.version() == 5
        assert not cluster.ask(0, lambda server: server.readable(4))
        assert cluster.ask(0, lambda server: server.readable(5))
        with pytest.raises(VersionGone, match="has version 5, not 4"):
            cluster.clients[0].read(4)
    finally:
        cluster.close()
