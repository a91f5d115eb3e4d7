"""Transport between a worker actor and server actors: Ray calls, tensors as zero-copy NumPy arrays in its store."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ray
import ray.exceptions
import torch
from torch import Tensor

from paramserver.errors import ServerLost, StepTimeout
from paramserver.integers import IntegerBlock
from paramserver.messages import Commit, Hello, Push
from paramserver.partition import Slice

__all__ = ["RayTransport", "WireArrival", "WirePush", "from_wire", "to_wire"]

_LOOK_S = 1.0
"""How often a wait looks at pushes that were sent meanwhile."""


class WirePush(NamedTuple):
    """A push as it travels: NumPy arrays, which Ray copies once, where it copies tensors twice."""

    push: Push
    """Without its slices."""
    slices: dict[int, Any]


def to_wire(push: Push) -> WirePush:
    """The push for the way; its memory is copied when Ray takes it."""
    slices = {index: value.numpy() for index, value in push.slices.items()}
    return WirePush(push._replace(slices={}, integers=IntegerBlock.pack(push.integers)), slices)


def from_wire(wire: WirePush) -> Push:
    """The push with tensors that share the arrays' read-only memory: nobody may write them."""
    return wire.push._replace(slices={index: torch.from_numpy(value) for index, value in wire.slices.items()})


class WireArrival(NamedTuple):
    """What a server has of a version beyond what its caller has."""

    batches: list[tuple[tuple[int, ...], list[Any]]]
    """Indices of slices, and a list with the reference of their arrays in Ray's object store."""
    commit: Commit | None
    """Once the version is committed; no more batches follow."""
    integers: Mapping[str, Tensor]
    """Integer buffers of a committed version."""


class _Version(NamedTuple):
    """A whole version of a server's slices."""

    version: int
    slices: dict[int, Tensor]
    commit: Commit | None
    integers: Mapping[str, Tensor]


class RayTransport:
    """One worker's way to server actors.

    Args:
        servers: handles of the actors, by index.
    """

    def __init__(self, servers: Sequence[Any]) -> None:
        self.num_servers = len(servers)
        self._servers = list(servers)
        self._pushes: list[list[Any]] = [[] for _ in servers]
        self._arrived: dict[int, _Version] = {}

    @property
    def versions(self) -> None:
        """See ``Transport.versions``: they come as copies."""

    def hello(self, server: int, timeout_s: float) -> Hello:
        """See ``Transport.hello``."""
        reply: Hello = self._get(server, self._servers[server].hello.remote(), timeout_s, "say hello")
        return reply

    def allocate(self, numel: int) -> Tensor:
        """See ``Transport.allocate``: Ray copies whatever it sends."""
        return torch.zeros(numel)

    def push(self, server: int, push: Push) -> None:
        """See ``Transport.push``: the tensors are copied before this returns."""
        self._pushes[server].append(self._servers[server].push.remote(to_wire(push)))

    def wait(self, server: int, version: int, timeout_s: float) -> Commit:
        """See ``Transport.wait``."""
        for _ in self.arrivals(server, version, timeout_s):
            pass
        for push in list(self._pushes[server]):
            self._settle(server, push, timeout_s)
        commit = self._arrived[server].commit
        assert commit is not None
        return commit

    def arrivals(self, server: int, version: int, timeout_s: float) -> Iterator[Mapping[int, Tensor]]:
        """See ``Carrier.arrivals``."""
        arrived = self._arrived.get(server)
        if arrived is not None and arrived.version >= version and arrived.commit is not None:
            return
        deadline = time.monotonic() + timeout_s
        slices: dict[int, Tensor] = {}
        batches = 0
        while True:
            arrival = self._next_arrival(server, version, batches, deadline - time.monotonic(), timeout_s)
            for indices, (reference,) in arrival.batches:
                arrays = self._get(server, reference, timeout_s, f"send version {version}")
                batch = {index: torch.from_numpy(array) for index, array in zip(indices, arrays, strict=True)}
                slices.update(batch)
                yield batch
            batches += len(arrival.batches)
            if arrival.commit is not None:
                self._arrived[server] = _Version(arrival.commit.version, slices, arrival.commit, arrival.integers)
                return

    def _next_arrival(self, server: int, version: int, have: int, left_s: float, timeout_s: float) -> WireArrival:
        waiting = self._servers[server].arrivals.remote(version, have, max(0.0, left_s), timeout_s)
        # The server keeps the deadline itself, and knows what it waits for: give it a moment longer to say so.
        deadline = time.monotonic() + max(0.0, left_s) + 5.0
        while time.monotonic() < deadline:
            sent = list(self._pushes[server])
            ready, _ = ray.wait([waiting, *sent], num_returns=1, timeout=_LOOK_S)
            if waiting in ready:
                break
            for push in ready:  # it was taken, or refused
                self._settle(server, push, timeout_s)
        arrival: WireArrival = self._get(server, waiting, 0.0, f"commit version {version}")
        return arrival

    def _settle(self, server: int, push: Any, timeout_s: float) -> None:
        self._pushes[server].remove(push)
        self._get(server, push, timeout_s, "take a push")

    def fetch(self, server: int, version: int, timeout_s: float) -> tuple[Sequence[Tensor], Mapping[str, Tensor]]:
        """See ``Transport.fetch``."""
        arrived = self._arrived.get(server)
        if arrived is None or arrived.version != version:
            batches, _, integers = self._get(
                server, self._servers[server].publish.remote(version), timeout_s, "publish"
            )
            slices: dict[int, Tensor] = {}
            for indices, (reference,) in batches:
                arrays = self._get(server, reference, timeout_s, f"send version {version}")
                slices.update((index, torch.from_numpy(array)) for index, array in zip(indices, arrays, strict=True))
            arrived = self._arrived[server] = _Version(version, slices, None, integers)
        return [arrived.slices[index] for index in sorted(arrived.slices)], arrived.integers

    def await_slices(self, version: int, pieces: Sequence[Slice], timeout_s: float) -> None:
        """See ``Transport.await_slices``; there are no ``versions`` here."""
        for server in {piece.server for piece in pieces}:
            self.wait(server, version, timeout_s)

    def _get(self, server: int, reference: Any, timeout_s: float, what: str) -> Any:
        try:
            return ray.get(reference, timeout=timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise StepTimeout(
                f"server {server} did not {what} within {timeout_s:.0f} s (--step-timeout)", server=server
            ) from None
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayActorError:
            raise ServerLost(f"server {server} is gone: it could not {what}", server=server) from None

    def close(self) -> None:
        """See ``Transport.close``."""
        self._arrived.clear()
