"""What goes between a worker and a server."""

import marshal
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from paramserver.integers import IntegerBlock
from paramserver.partition import Slice
from paramserver.reduction import Node

__all__ = [
    "ROW",
    "Commit",
    "Decision",
    "FlatSlices",
    "Hello",
    "MicrobatchStats",
    "Push",
    "Report",
    "UsualCommit",
    "pack_commit",
    "pack_rows",
    "unpack_commit",
    "unpack_rows",
]


# A step makes and sends many of these messages: named tuples cost a fifth of frozen data classes.

_NO_INTEGERS: Mapping[str, Tensor] = {}
_NO_TIMES: Mapping[str, float] = {}


class MicrobatchStats(NamedTuple):
    """What one microbatch counted."""

    microbatch: int
    """Which microbatch of the step."""
    loss: float
    """Summed loss."""
    weight: float
    """What the summed loss is divided by, over the whole minibatch."""
    samples: int
    """Number of samples; 0 for an empty microbatch."""


class FlatSlices(Mapping[int, Tensor]):
    """The slices of one server as pieces of a flat (length,) vector, looked up by slice index.

    A transport that can send a whole vector at once sees by the type that it may.
    """

    def __init__(self, flat: Tensor, pieces: Sequence[Slice]) -> None:
        self.flat = flat
        self.pieces = pieces

    @cached_property
    def _views(self) -> dict[int, Tensor]:
        return {piece.index: self.flat[piece.start : piece.stop] for piece in self.pieces}

    def __getitem__(self, index: int) -> Tensor:
        return self._views[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self.pieces)


class Push(NamedTuple):
    """A contribution to one step: the sums over one tree node, for slices of one server."""

    run: str
    """Run id and resume count: a push of an earlier life of the run is refused."""
    step: int
    """The open step: its update takes version ``step`` to ``step + 1``."""
    generation: int
    """Rises with every change of the membership; older ones are refused."""
    worker: int
    """Who computed it, for messages alone."""
    node: Node
    """Which microbatches."""
    slices: Mapping[int, Tensor]
    """(n,) fp32 by slice index: summed gradients, and for buffers samples x (after - pulled). Not modified."""
    stats: tuple[MicrobatchStats, ...]
    """One row for each microbatch of the node."""
    integers: Mapping[str, Tensor] = _NO_INTEGERS
    """Integer and boolean buffers after a microbatch; all microbatches must agree. Empty if all were empty."""


class Report(NamedTuple):
    """A server's part of the vote on a step (E8)."""

    server: int
    step: int
    """Which step is voted on."""
    squared_norms: tuple[tuple[int, int, str, float], ...]
    """Key's offset, start of the piece, key, float64 sum of squares of its mean gradient: in key order when sorted."""


class Decision(NamedTuple):
    """What all servers do with a step."""

    apply: bool
    """False drops the step: version ``t + 1`` is a copy of ``t``."""
    scale: float
    """Factor on the mean gradient, 1 unless its norm is clipped."""
    norm: float
    """l2 norm of the whole mean gradient."""
    key: str | None = None
    """First key with a non-finite gradient."""


class Commit(NamedTuple):
    """Word that a server's slices all have version ``version``."""

    version: int
    stats: tuple[MicrobatchStats, ...]
    """All microbatches of the step, in order."""
    lr: float
    """Learning rate that was applied, before group factors."""
    skipped: bool = False
    """Whether the step was dropped."""
    grad_norm: float | None = None
    """l2 norm before clipping, where there was a vote."""
    scale: float = 1.0
    """The vote's factor on the mean gradient."""
    server_ms: Mapping[str, float] = _NO_TIMES
    """Busy time of this server by stage."""
    last_worker: int | None = None
    """Whose contribution came last."""
    stop: bool = False
    """Whether this is the last version of the run."""
    generation: int = 0
    """In which it was computed."""
    leave: bool = False
    """Whether workers are to come back after it: the membership is about to change."""
    checksums: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """Of this version's slices, where workers are to compare them with what they hold; see ``Checksums``."""

    @property
    def decision(self) -> Decision | None:
        """The vote that was taken on the step, if one was."""
        if self.grad_norm is None:
            return None
        return Decision(not self.skipped, self.scale, self.grad_norm)


ROW = struct.Struct("<qddq")
"""A row of ``MicrobatchStats``."""
_STATS, _SERVER_MS = Commit._fields.index("stats"), Commit._fields.index("server_ms")
_USUAL, _OTHER = b"U", b"O"
_STAGES = ("aggregate", "update", "commit")
_STOP, _LEAVE = 1, 2


class UsualCommit:
    """How a commit lies in bytes that has nothing but what each one has: at fixed places, which C code fills, too.

    After ``HEADER`` come the rows in order, the integer buffers' layout and their content.
    """

    HEADER = struct.Struct("<cqqqdiiiiddd")
    """Kind, version, last worker (-1: none), generation, lr, flags, rows, bytes of the layout and of the content, then
    milliseconds of aggregate, update and commit."""
    LAST_WORKER = 1 + 8
    FLAGS = 1 + 4 * 8
    UPDATE_MS = FLAGS + 4 * 4 + 8
    """Of the update and the commit."""

    @staticmethod
    def flags(*, stop: bool, leave: bool) -> int:
        """What stands at ``FLAGS``."""
        return _STOP * stop | _LEAVE * leave


def pack_rows(rows: Iterable[MicrobatchStats]) -> bytes:
    """Rows as bytes."""
    return b"".join([ROW.pack(*row) for row in rows])


def unpack_rows(data: bytes, start: int, stop: int) -> tuple[MicrobatchStats, ...]:
    """What ``pack_rows`` made bytes ``start`` to ``stop`` of."""
    return tuple(map(MicrobatchStats._make, ROW.iter_unpack(data[start:stop])))


def pack_commit(commit: Commit, integers: IntegerBlock) -> bytes:
    """A commit and the integer buffers of its version as bytes.

    As plain values: pickle looks each class up by its name, which in caches that a backward has just swept takes longer
    than all the rest.
    """
    if not _is_usual(commit):
        rest: list[Any] = list(commit)
        rest[_STATS], rest[_SERVER_MS] = [tuple(row) for row in commit.stats], dict(commit.server_ms)
        return _OTHER + marshal.dumps((rest, integers.layout, integers.to_bytes()))
    content = integers.to_bytes()
    header = UsualCommit.HEADER.pack(
        _USUAL,
        commit.version,
        -1 if commit.last_worker is None else commit.last_worker,
        commit.generation,
        commit.lr,
        UsualCommit.flags(stop=commit.stop, leave=commit.leave),
        len(commit.stats),
        len(integers.layout),
        len(content),
        *(commit.server_ms[stage] for stage in _STAGES),
    )
    return b"".join((header, pack_rows(commit.stats), integers.layout, content))


def _is_usual(commit: Commit) -> bool:
    voted = commit.skipped or commit.grad_norm is not None or commit.scale != 1.0
    return not voted and not commit.checksums and tuple(commit.server_ms) == _STAGES


def unpack_commit(data: bytes) -> tuple[Commit, IntegerBlock]:
    """What ``pack_commit`` made bytes of."""
    if data[:1] == _OTHER:
        rest, layout, content = marshal.loads(data[1:])
        rest[_STATS] = tuple(MicrobatchStats(*row) for row in rest[_STATS])
        return Commit(*rest), IntegerBlock(layout, content)
    # Without names and stars: a worker reads this in caches that are not its own, and each line that it runs counts.
    _, version, last, generation, lr, flags, num_rows, of_layout, of_content, aggregate_ms, update_ms, commit_ms = (
        UsualCommit.HEADER.unpack_from(data)
    )
    layout_at = UsualCommit.HEADER.size + ROW.size * num_rows
    content_at = layout_at + of_layout
    commit = Commit._make(
        (
            version,
            unpack_rows(data, UsualCommit.HEADER.size, layout_at),
            lr,
            False,
            None,
            1.0,
            {"aggregate": aggregate_ms, "update": update_ms, "commit": commit_ms},
            None if last < 0 else last,
            bool(flags & _STOP),
            generation,
            bool(flags & _LEAVE),
            (),
        )
    )
    return commit, IntegerBlock(data[layout_at:content_at], data[content_at : content_at + of_content])


class Hello(NamedTuple):
    """What a worker learns when it first meets a server."""

    run: str
    generation: int
    partition_hash: str
    version: int
    constants: Mapping[str, Tensor]
    """Frozen keys: they have no slice and never change. Server 0 alone has them."""
    last: Commit | None = None
    """The commit of ``version``; None if the run started from it."""
