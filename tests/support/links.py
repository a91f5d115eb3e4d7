"""Ways to reach servers, all driven by the same contract test."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

from paramserver.client import Client
from paramserver.config import OptimizerConfig
from paramserver.messages import Decision, Report
from paramserver.server import Server
from paramserver.server_memory import ServerMemory
from paramserver.transport.hub import Hub
from paramserver.transport.in_process import InProcessTransport
from paramserver.transport.protocol import Transport
from paramserver.transport.relay import Relay
from paramserver.transport.shared_memory import SharedMemoryTransport
from paramserver.transport.versions import VersionsArena, share_versions
from paramserver.vote import decide
from tests.support.servers import TIMEOUT_S, Fleet


class Link(Protocol):
    """Servers that hold what a ``Fleet`` describes, behind one kind of transport."""

    deadline_s: float
    """Time enough for a push to arrive: what a test waits that must run out of time."""

    def start(self, fleet: Fleet) -> None:
        """Let the servers begin with the state that ``fleet`` begins with."""

    def transport(self) -> Transport:
        """One worker's way to them."""

    def settle(self) -> None:
        """Return once every push so far has reached its server: transports may reorder what they carry."""

    def client(self, fleet: Fleet, worker: int = 0, timeout_s: float = TIMEOUT_S) -> Client:
        """One worker's client."""
        return Client(worker, fleet.partition, self.transport(), timeout_s)


class InProcessLink(Link):
    """Servers in the test's own process."""

    deadline_s = 0.0

    def start(self, fleet: Fleet) -> None:
        """See ``Link.start``."""
        self._group = fleet.group

    def transport(self) -> Transport:
        """See ``Link.transport``."""
        return InProcessTransport(self._group)


class RayLink(Link):
    """Real server actors. They are started once and begin anew for each test: a process costs seconds."""

    deadline_s = 1.0

    def __init__(self, num_servers: int) -> None:
        import ray

        from cluster.server_actor import ServerActor

        fleet = Fleet({}, num_servers=num_servers)
        actor = ray.remote(ServerActor).options(num_cpus=1, max_restarts=0, max_task_retries=0)
        self._actors = [actor.remote(*self._arguments(fleet)) for _ in range(num_servers)]
        self._used: list[Any] = []

    @staticmethod
    def _arguments(fleet: Fleet, *more: Any) -> tuple[Any, ...]:
        return (fleet.partition, fleet.optimizer, fleet.num_microbatches, fleet.initial, "run", 1, "/dev/shm", *more)

    def start(self, fleet: Fleet, *more: Any) -> None:
        """See ``Link.start``."""
        import ray

        from cluster.server_actor import ServerActor

        ray.get([actor.close.remote() for actor in self._used], timeout=60)
        self._transports: list[Any] = []
        self._used = self._actors[: len(fleet.servers)]
        anew = [actor.__ray_call__.remote(ServerActor.__init__, *self._arguments(fleet, *more)) for actor in self._used]
        ray.get(anew, timeout=60)
        ray.get([actor.open.remote(index, None) for index, actor in enumerate(self._used)], timeout=60)
        ray.get([actor.regroup.remote(0, self._used, (), {}) for actor in self._used], timeout=60)

    def transport(self) -> Transport:
        """See ``Link.transport``."""
        from cluster.ray_transport import RayTransport

        self._transports.append(RayTransport(self._used))
        return self._transports[-1]

    def settle(self) -> None:
        """See ``Link.settle``."""
        import ray

        sent = [push for transport in self._transports for pushes in transport._pushes for push in pushes]
        if sent:
            ray.wait(sent, num_returns=len(sent), timeout=TIMEOUT_S)


class SharedMemoryLink(Link):
    """Hubs of this process with arenas and sockets of their own; two servers share one arena, as on a node."""

    deadline_s = 0.5

    def __init__(self) -> None:
        self._hubs: list[Hub | Relay] = []
        self._transports: list[SharedMemoryTransport] = []

    def start(self, fleet: Fleet) -> None:
        """See ``Link.start``."""
        self.close()
        self._partition = fleet.partition
        ballot = _Ballot(len(fleet.servers), fleet.optimizer)
        for index in range(len(fleet.servers)):
            versions = share_versions(self._hubs[0].address if self._hubs else None, fleet.partition)
            about = (index, fleet.partition, fleet.optimizer, fleet.num_microbatches, fleet.initial)
            memory = ServerMemory(fleet.partition, index, *about[2:], versions.vectors)
            server = Server(*about, memory=memory)
            self._hubs.append(Hub(server, versions, threads=2, before_update=partial(server.vote, ballot.cast)))

    def transport(self) -> Transport:
        """See ``Link.transport``."""
        addresses = {index: hub.address for index, hub in enumerate(self._hubs)}
        self._transports.append(SharedMemoryTransport(addresses, self._partition))
        return self._transports[-1]

    def settle(self) -> None:
        """See ``Link.settle``: a socket keeps order, so an answer comes after everything that was sent before."""
        for transport in self._transports:
            for index in range(len(self._hubs)):
                transport._late(index, 0, 0.0)

    def close(self) -> None:
        """Stop everything."""
        for transport in self._transports:
            transport.close()
        for hub in self._hubs:
            hub.close()
        self._transports, self._hubs = [], []


class RelayedLink(SharedMemoryLink):
    """The servers of ``InProcessLink``, behind a node's relays: workers see sockets and shared memory of their node."""

    def start(self, fleet: Fleet) -> None:
        """See ``Link.start``."""
        self.close()
        self._partition = fleet.partition
        versions = VersionsArena.create(fleet.partition)
        self._hubs = [
            Relay(
                index,
                fleet.partition,
                fleet.num_microbatches,
                range(fleet.num_microbatches),
                InProcessTransport(fleet.group),
                versions,
                threads=2,
                timeout_s=TIMEOUT_S,
            )
            for index in range(len(fleet.servers))
        ]


class _Ballot:
    """What server 0 does for all: the last report makes the decision."""

    def __init__(self, count: int, optimizer: OptimizerConfig) -> None:
        self._reports: list[Report] = []
        self._optimizer = optimizer
        self._all_cast = threading.Barrier(count, self._decide)

    def cast(self, report: Report) -> Decision:
        """The decision, once all have reported."""
        self._reports.append(report)
        self._all_cast.wait(TIMEOUT_S)
        return self._decision

    def _decide(self) -> None:
        self._decision = decide(self._reports, self._optimizer)
        self._reports.clear()


@contextmanager
def shared_memory_link(num_servers: int) -> Iterator[Link]:
    """Servers behind sockets and shared memory."""
    link = SharedMemoryLink()
    try:
        yield link
    finally:
        link.close()


@contextmanager
def relayed_link(num_servers: int) -> Iterator[Link]:
    """Servers that stand elsewhere, behind a node's relays."""
    link = RelayedLink()
    try:
        yield link
    finally:
        link.close()


@contextmanager
def in_process_link(num_servers: int) -> Iterator[Link]:
    """Servers in the test's own process."""
    yield InProcessLink()


@contextmanager
def ray_link(num_servers: int) -> Iterator[Link]:
    """Server actors on a Ray cluster of their own."""
    from cluster.session import ray_session  # before anything imports ray, which reads its environment then

    with ray_session(address=None, num_cpus=num_servers, num_gpus=0, store_bytes=1):
        yield RayLink(num_servers)
