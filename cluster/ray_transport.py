"""Transport between a worker actor and server actors: Ray calls, tensors as zero-copy NumPy arrays in its store."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ray
import ray.exceptions
import torch
from torch import Tensor

from paramserver.errors import ServerLost, StepTimeout
from paramserver.integers import IntegerBlock
from paramserver.messages import Commit, Hello, Push

__all__ = ["RayTransport", "WirePush", "from_wire", "to_wire"]


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


class RayTransport:
    """One worker's way to server actors.

    Args:
        servers: handles of the actors, by index.
    """

    def __init__(self, servers: Sequence[Any]) -> None:
        self.num_servers = len(servers)
        self._servers = list(servers)
        self._pushes: list[list[Any]] = [[] for _ in servers]
        self._arrived: dict[int, tuple[int, Any]] = {}

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
        waiting = self._servers[server].wait.remote(version, timeout_s)
        sent, self._pushes[server] = self._pushes[server], []
        for push in sent:
            self._get(server, push, timeout_s, "take a push")
        # The server keeps the deadline itself, and knows what it waits for: give it a moment longer to say so.
        commit, published = self._get(server, waiting, timeout_s + 5.0, f"commit version {version}")
        self._arrived[server] = (version, published)
        return commit  # type: ignore[no-any-return]

    def fetch(self, server: int, version: int, timeout_s: float) -> tuple[Sequence[Tensor], Mapping[str, Tensor]]:
        """See ``Transport.fetch``."""
        arrived, published = self._arrived.get(server, (-1, None))
        if published is None or arrived != version:
            published = self._get(server, self._servers[server].publish.remote(version), timeout_s, "publish")
        arrays, integers = self._get(server, published[0], timeout_s, f"send version {version}")
        return [torch.from_numpy(values) for values in arrays], integers

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
