"""The arena in which the servers of one machine keep both versions of the flat vector, for its workers to read."""

import os
from pathlib import Path

from paramserver.arena import DEFAULT_ARENA_DIR, Arena, round_to_pages
from paramserver.partition import ELEMENT_BYTES, Partition
from paramserver.transport.channel import Address, connect

__all__ = ["VersionsArena", "attach_versions"]


class VersionsArena:
    """One word a server with its committed version, then version ``v`` of the flat vector at ``vectors[v % 2]``.

    Args:
        arena: made by ``create``, or another process's.
        partition: of the run.
    """

    def __init__(self, arena: Arena, partition: Partition) -> None:
        self.arena = arena
        stat = os.fstat(arena.descriptor)
        self.identity = (stat.st_dev, stat.st_ino)
        """By which two processes see that they have mapped the same."""
        header, vector = _sizes(partition)
        self._committed = arena.words(partition.num_servers)
        self.vectors = (arena.tensor(header, partition.length), arena.tensor(header + vector, partition.length))

    @classmethod
    def create(cls, partition: Partition, folder: Path = DEFAULT_ARENA_DIR) -> "VersionsArena":
        """A new one; see ``Arena.create``."""
        header, vector = _sizes(partition)
        return cls(Arena.create(header + 2 * vector, folder), partition)

    def committed(self, server: int) -> int:
        """The version that a server wrote last and whole."""
        return self._committed[server]

    def commit(self, server: int, version: int) -> None:
        """Write the version number, after everything it stands for."""
        self._committed[server] = version


def attach_versions(address: Address, partition: Partition, timeout_s: float = 30.0) -> VersionsArena:
    """The arena of the hub at ``address``, for another server of its machine to write its own slices into."""
    channel = connect(address, timeout_s)
    try:
        _, (descriptor,) = channel.receive(timeout_s)
    finally:
        channel.close()
    return VersionsArena(Arena.attach(descriptor), partition)


def _sizes(partition: Partition) -> tuple[int, int]:
    return round_to_pages(8 * partition.num_servers), round_to_pages(ELEMENT_BYTES * partition.length)
