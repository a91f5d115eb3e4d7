"""Ways to reach servers, all driven by the same contract test."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from paramserver.client import Client
from paramserver.transport.in_process import InProcessTransport
from paramserver.transport.protocol import Transport
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

        from cluster.actors import ServerActor

        fleet = Fleet({}, num_servers=num_servers)
        actor = ray.remote(ServerActor).options(num_cpus=1, max_restarts=0, max_task_retries=0)
        self._actors = [actor.remote(*self._arguments(fleet, index)) for index in range(num_servers)]
        ray.get([actor.meet.remote(self._actors) for actor in self._actors], timeout=60)

    @staticmethod
    def _arguments(fleet: Fleet, index: int) -> tuple[Any, ...]:
        return (index, fleet.partition, fleet.optimizer, fleet.num_microbatches, fleet.initial, "run", 1, ())

    def start(self, fleet: Fleet) -> None:
        """See ``Link.start``."""
        import ray

        from cluster.actors import ServerActor

        self._partition = fleet.partition
        self._transports: list[Any] = []
        self._used = self._actors[: len(fleet.servers)]
        anew = [
            actor.__ray_call__.remote(ServerActor.__init__, *self._arguments(fleet, index))
            for index, actor in enumerate(self._used)
        ]
        ray.get(anew, timeout=60)
        ray.get([actor.meet.remote(self._used) for actor in self._used], timeout=60)

    def transport(self) -> Transport:
        """See ``Link.transport``."""
        from cluster.ray_transport import RayTransport

        self._transports.append(RayTransport(self._used, self._partition))
        return self._transports[-1]

    def settle(self) -> None:
        """See ``Link.settle``."""
        import ray

        sent = [push for transport in self._transports for pushes in transport._pushes for push in pushes]
        if sent:
            ray.wait(sent, num_returns=len(sent), timeout=TIMEOUT_S)


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
