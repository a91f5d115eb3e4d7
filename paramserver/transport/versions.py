"""The arena in which the servers of one machine keep both versions of the flat vector, for its workers to read."""

import os
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from torch import Tensor

from paramserver.arena import DEFAULT_ARENA_DIR, Arena, round_to_pages
from paramserver.partition import ELEMENT_BYTES, Partition, Slice
from paramserver.server_memory import STAGGER
from paramserver.transport.channel import Address, connect

__all__ = ["VersionsArena", "share_versions"]

_WORD_BYTES = 8
_WORKERS = 256
"""Words for workers: more of a node share them."""
_TIMEOUT_S = 30.0


class VersionsArena:
    """Words that say what stands here, then version ``v`` of the flat vector at ``vectors[v % 2]``.

    There is a word for each server with its committed version, one for each slice with the newest version that it has
    (a slice has it before its server commits it), and one for each worker, in which it says where it is. Words are
    written after everything they stand for, in which order x86 shows them to others, too.

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
        servers, slices = partition.num_servers, len(partition.slices)
        words = arena.words(servers + slices + _WORKERS)
        self._committed, self._written = words[:servers], words[servers : servers + slices]
        self._workers = words[servers + slices :]
        self.vectors: tuple[Tensor, Tensor] = (
            arena.tensor(header, partition.length),
            arena.tensor(header + vector + ELEMENT_BYTES * STAGGER, partition.length),
        )

    @classmethod
    def create(cls, partition: Partition, folder: Path = DEFAULT_ARENA_DIR) -> "VersionsArena":
        """A new one; see ``Arena.create``."""
        header, vector = _sizes(partition)
        return cls(Arena.create(header + 2 * vector + ELEMENT_BYTES * STAGGER, folder), partition)

    def committed(self, server: int) -> int:
        """The version that a server wrote last and whole."""
        return self._committed[server]

    def commit(self, server: int, version: int) -> None:
        """Say that all slices of a server stand at ``version``."""
        self._committed[server] = version

    def has(self, piece: Slice, version: int) -> bool:
        """Whether a slice stands at ``version`` or a later one."""
        return self._written[piece.index] >= version

    def mark(self, pieces: Iterable[Slice], version: int) -> None:
        """Say that slices stand at ``version``."""
        for piece in pieces:
            self._written[piece.index] = version

    def addresses(self, pieces: Iterable[Slice], server: int) -> tuple[list[int], int]:
        """Where the words of slices and of a server lie, for code that writes them as ``mark`` and ``commit`` do."""
        words = self.arena.tensor(0, 1).data_ptr()
        first = words + _WORD_BYTES * len(self._committed)
        return [first + _WORD_BYTES * piece.index for piece in pieces], words + _WORD_BYTES * server

    def note(self, worker: int, word: int) -> None:
        """A worker says where it is."""
        self._workers[worker % _WORKERS] = word

    def noted(self, worker: int) -> int:
        """What a worker has said last; 0 if nothing."""
        return self._workers[worker % _WORKERS]


def share_versions(beside: Address | None, partition: Partition, folder: Path = DEFAULT_ARENA_DIR) -> VersionsArena:
    """The arena for another server of a machine to write its own slices into.

    Args:
        beside: address of the hub of a server of the same machine, whose arena it is; None makes one.
        partition: of the run.
        folder: where one is made.
    """
    if beside is None:
        return VersionsArena.create(partition, folder)
    with closing(connect(beside, _TIMEOUT_S)) as channel:
        _, (descriptor,) = channel.receive(_TIMEOUT_S)
    return VersionsArena(Arena.attach(descriptor), partition)


def _sizes(partition: Partition) -> tuple[int, int]:
    words = partition.num_servers + len(partition.slices) + _WORKERS
    return round_to_pages(_WORD_BYTES * words), round_to_pages(ELEMENT_BYTES * partition.length)
