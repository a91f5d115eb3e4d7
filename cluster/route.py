"""Which way a worker takes to which server: shared memory on its own node, Ray to the others."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.ray_transport import RayTransport
from paramserver.messages import Commit, Hello, Push
from paramserver.partition import Partition
from paramserver.transport.channel import Address
from paramserver.transport.protocol import Transport
from paramserver.transport.shared_memory import SharedMemoryTransport

__all__ = ["RoutedTransport", "route"]


def route(servers: Sequence[Any], addresses: Mapping[int, Address], partition: Partition, arena_dir: Path) -> Transport:
    """The transport of one worker.

    Args:
        servers: handles of all server actors.
        addresses: of those on the worker's own node, by server.
        partition: of the run.
        arena_dir: where the worker makes shared memory.
    """
    if not addresses:
        return RayTransport(servers)
    near = SharedMemoryTransport(addresses, partition, arena_dir)
    if len(addresses) == len(servers):
        return near
    far = RayTransport(servers)
    return RoutedTransport([near if server in addresses else far for server in range(len(servers))])


class RoutedTransport:
    """A transport a server; vectors come from the first that shares memory.

    Args:
        by_server: the way to each server.
    """

    def __init__(self, by_server: Sequence[Transport]) -> None:
        self.num_servers = len(by_server)
        self._by_server = list(by_server)
        self._near = next((way for way in by_server if isinstance(way, SharedMemoryTransport)), None)

    @property
    def versions(self) -> None:
        """See ``Transport.versions``: a part of them is elsewhere."""

    def hello(self, server: int, timeout_s: float) -> Hello:
        """See ``Transport.hello``."""
        return self._by_server[server].hello(server, timeout_s)

    def allocate(self, numel: int) -> Tensor:
        """See ``Transport.allocate``."""
        return self._near.allocate(numel) if self._near else torch.zeros(numel)

    def push(self, server: int, push: Push) -> None:
        """See ``Transport.push``."""
        self._by_server[server].push(server, push)

    def wait(self, server: int, version: int, timeout_s: float) -> Commit:
        """See ``Transport.wait``."""
        return self._by_server[server].wait(server, version, timeout_s)

    def fetch(self, server: int, version: int, timeout_s: float) -> tuple[Sequence[Tensor], Mapping[str, Tensor]]:
        """See ``Transport.fetch``."""
        return self._by_server[server].fetch(server, version, timeout_s)

    def close(self) -> None:
        """See ``Transport.close``."""
        for way in {id(way): way for way in self._by_server}.values():
            way.close()
