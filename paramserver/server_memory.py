"""Everything that a server's updates write, in two versions, where it outlives the server's process (E5).

Parameters and float buffers lie in two flat vectors, which servers of one machine share and their workers read. What
else an update writes lies in one piece of bytes of each server's own: the optimizer's state, integer buffers and the
commit itself. The number of the committed version is written last; whoever maps the same memory later goes on from it.
"""

import struct
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from paramserver.config import OptimizerConfig
from paramserver.errors import PartitionMismatch
from paramserver.integers import IntegerBlock
from paramserver.messages import Commit, unpack_commit
from paramserver.partition import BUFFERS, ELEMENT_BYTES, Partition, Slice
from paramserver.state import State

__all__ = ["CHUNK", "STAGGER", "ChunkMemory", "ServerMemory"]

CHUNK = 1 << 18
"""Elements that go through sum, division and update before the next ones do: 1 MiB. Smaller ones fit nearer caches, but
threads then fight for the interpreter between operations."""

STAGGER = 320
"""Elements between vectors that are read and written side by side: with equal addresses modulo 4 KiB a processor takes
each load for one of the store before it, and waits."""

_PAGE = 4096
_HEADER = struct.Struct("<q32s")
"""Committed version plus one (0: never filled), and the layout's hash."""
_WORD = struct.Struct("<q")
_BEGUN = 64
"""Where the word lies that says of which version something was written last, plus one."""
_ROW_BYTES = 64
_KEY_BYTES = 16
"""What a microbatch's row takes at most in a commit's record."""
_RECORD_BYTES = 4096

_STATE_NAMES = {"sgd": ("momentum_buffer",), "adam": ("exp_avg", "exp_avg_sq"), "adamw": ("exp_avg", "exp_avg_sq")}


class ChunkMemory(NamedTuple):
    """Optimizer state of one chunk of a slice, version ``v`` at ``v % 2``."""

    vectors: tuple[dict[str, Tensor], dict[str, Tensor]]
    """(n,) fp32 by torch.optim's names."""
    updates: tuple[Tensor, Tensor]
    """fp32 without dimensions: how many updates the state has seen, Adam's ``step``; 0 where there is no state yet."""


@dataclass(frozen=True)
class _Layout:
    """Where things lie in the bytes."""

    record: int
    """Bytes of one version's record."""
    chunks: int
    """Chunks of all slices that have optimizer state."""
    elements: int
    """Elements of these slices."""
    names: tuple[str, ...]

    @property
    def updates(self) -> int:
        """Where the update counts begin."""
        return _PAGE + 2 * self.record

    @property
    def vectors(self) -> int:
        """Where the state vectors begin."""
        return _pages(self.updates + 2 * ELEMENT_BYTES * self.chunks)

    @property
    def num_bytes(self) -> int:
        """Size of everything."""
        return self.vectors + 2 * len(self.names) * ELEMENT_BYTES * (self.elements + STAGGER)


class ServerMemory:
    """The memory of one server.

    Args:
        partition: of the run.
        server: which server.
        optimizer: its optimizer.
        num_microbatches: ``M``.
        state: what the run starts from, of which the keys and shapes count.
        vectors: the two flat (length,) fp32 vectors, of which the server writes its own slices; None makes them.
        content: (``num_bytes``,) uint8, zeroed or left by another server of the same layout; None makes them.

    Raises:
        PartitionMismatch: if ``content`` was left by a server of another layout.
    """

    def __init__(
        self,
        partition: Partition,
        server: int,
        optimizer: OptimizerConfig,
        num_microbatches: int,
        state: State,
        vectors: tuple[Tensor, Tensor] | None = None,
        content: Tensor | None = None,
    ) -> None:
        self._layout = layout = _layout(partition, server, optimizer, num_microbatches, state)
        # Not zeroed: pages of other servers' slices are never touched and cost nothing.
        self.vectors = vectors or (torch.empty(partition.length), torch.empty(partition.length))
        self._content = torch.zeros(layout.num_bytes, dtype=torch.uint8) if content is None else content
        self._bytes = memoryview(self._content.numpy())  # type: ignore[arg-type]
        self._hash = bytes.fromhex(partition.hash)
        _, known = _HEADER.unpack_from(self._bytes)
        if self.filled and known != self._hash:
            raise PartitionMismatch(f"server {server}: the memory left to it is of other parameters")
        self._chunks: dict[int, list[ChunkMemory]] = {}
        first_chunk = first_element = 0
        for piece in partition.by_server[server]:
            if piece.group != BUFFERS:
                self._chunks[piece.index] = list(self._carve(piece, first_chunk, first_element))
                first_chunk += len(self._chunks[piece.index])
                first_element += piece.numel

    @staticmethod
    def num_bytes(
        partition: Partition, server: int, optimizer: OptimizerConfig, num_microbatches: int, state: State
    ) -> int:
        """How large ``content`` must be."""
        return _layout(partition, server, optimizer, num_microbatches, state).num_bytes

    def _carve(self, piece: Slice, first_chunk: int, first_element: int) -> "list[ChunkMemory]":
        layout = self._layout
        carved = []
        for chunk, lo in enumerate(range(0, piece.numel, CHUNK)):
            numel = min(CHUNK, piece.numel - lo)
            vectors: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
            for version in range(2):
                for number, name in enumerate(layout.names):
                    vector = 2 * number + version
                    start = vector * (layout.elements + STAGGER) + first_element + lo
                    vectors[version][name] = self._floats(layout.vectors + ELEMENT_BYTES * start, numel)
            counts = [
                self._floats(layout.updates + ELEMENT_BYTES * (version * layout.chunks + first_chunk + chunk), 1)[0]
                for version in range(2)
            ]
            carved.append(ChunkMemory(vectors, (counts[0], counts[1])))
        return carved

    def _floats(self, offset: int, numel: int) -> Tensor:
        return self._content[offset : offset + ELEMENT_BYTES * numel].view(torch.float32)

    def chunks(self, piece: Slice) -> list[ChunkMemory]:
        """Optimizer state of a slice, chunk by chunk; none for buffers."""
        return self._chunks.get(piece.index, [])

    # -- the committed version ---------------------------------------------------------------------------------------

    @property
    def filled(self) -> bool:
        """Whether a version stands here."""
        return bool(_WORD.unpack_from(self._bytes)[0])

    @property
    def version(self) -> int:
        """The committed version."""
        return int(_WORD.unpack_from(self._bytes)[0]) - 1

    @property
    def begun(self) -> int:
        """The newest version of which something was written: the one two before it is gone."""
        return int(_WORD.unpack_from(self._bytes, _BEGUN)[0]) - 1

    def begin(self, version: int) -> None:
        """Something of ``version`` is written next."""
        _WORD.pack_into(self._bytes, _BEGUN, version + 1)

    def commit(self, version: int, record: bytes) -> None:
        """Everything of ``version`` stands here: say so, last of all. ``record`` is what ``pack_commit`` made of it."""
        place = _PAGE + version % 2 * self._layout.record
        assert _WORD.size + len(record) <= self._layout.record, "a commit's record is larger than was thought"
        _WORD.pack_into(self._bytes, place, len(record))
        self._bytes[place + _WORD.size : place + _WORD.size + len(record)] = record
        if not self.filled:
            _HEADER.pack_into(self._bytes, 0, 0, self._hash)
        # x86 shows writes to others in this order, and one aligned word at once.
        _WORD.pack_into(self._bytes, 0, version + 1)

    def record_places(self, version: int, length: int) -> tuple[int, int, int]:
        """Addresses of where ``commit`` puts a record of ``length`` bytes, its last word, and the word of ``begin``.

        The record's length comes first. Something must stand here already.
        """
        assert self.filled
        assert _WORD.size + length <= self._layout.record, "a commit's record is larger than was thought"
        start = self._content.data_ptr()
        return start + _PAGE + version % 2 * self._layout.record, start, start + _BEGUN

    def record(self, version: int) -> tuple[Commit, IntegerBlock] | None:
        """The commit of the committed version or of the one before it, with the integer buffers; None if unknown."""
        if not self.filled or not 0 <= self.version - version <= 1:
            return None
        place = _PAGE + version % 2 * self._layout.record
        length = _WORD.unpack_from(self._bytes, place)[0]
        if not length:
            return None
        commit, integers = unpack_commit(bytes(self._bytes[place + _WORD.size : place + _WORD.size + length]))
        return (commit, integers) if commit.version == version else None


def _layout(
    partition: Partition, server: int, optimizer: OptimizerConfig, num_microbatches: int, state: State
) -> _Layout:
    trained = [piece.numel for piece in partition.by_server[server] if piece.group != BUFFERS]
    uses_state = optimizer.name != "sgd" or optimizer.momentum
    integers = IntegerBlock.pack(state.integers if server == 0 else {})
    pieces = sum(1 + len(partition.pieces[piece.index]) for piece in partition.by_server[server])
    record = _RECORD_BYTES + _ROW_BYTES * num_microbatches + len(integers.layout) + len(integers.to_bytes())
    record += _KEY_BYTES * pieces  # checksums
    return _Layout(
        record=_pages(record),
        chunks=sum(-(-numel // CHUNK) for numel in trained),
        elements=sum(trained),
        names=_STATE_NAMES[optimizer.name] if uses_state else (),
    )


def _pages(num_bytes: int) -> int:
    return -(-num_bytes // _PAGE) * _PAGE
