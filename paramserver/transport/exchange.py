"""A round of the usual kind in one call that does not need the interpreter; see ``exchange.c``.

Usual is a step to which the same workers push the same vectors for the same tree nodes as to the one before, of which
the server knows beforehand all that is not in the rows: ``Server.plan``. Then Python has nothing to decide between the
last push and the word of the commit, and does its part before and afterwards, while workers compute. Each push is
compared with the one that was foretold, byte by byte up to its rows; whatever differs is left to Python, which takes
the step as it takes any other.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from paramserver.fused import PassUnavailable, WorkStruct, load_library
from paramserver.messages import ROW, UsualCommit
from paramserver.reduction import Node
from paramserver.round_plan import PlannedChunk, RoundPlan
from paramserver.transport.channel import frame, heading
from paramserver.transport.wire import again_head, encode_committed

__all__ = ["Exchange", "Foretold", "Words", "prepare_exchange"]


class Foretold(NamedTuple):
    """A push that is expected."""

    socket: int
    """Descriptor of the socket by which it comes, and the commit goes."""
    worker: int
    slot: int
    """See ``Arrival``."""
    step: int
    node: Node
    of_integers: int
    """Bytes of the integer buffers."""


class Words(NamedTuple):
    """Addresses of the words that show a version; see ``VersionsArena``."""

    slices: Sequence[int]
    committed: int


class _Task(ctypes.Structure):
    _fields_ = (("function", ctypes.c_void_p), ("work", WorkStruct))


class _Contributor(ctypes.Structure):
    _fields_ = (
        ("socket", ctypes.c_int32),
        ("here", ctypes.c_int32),
        ("worker", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("wanted", ctypes.c_char_p),
        ("push", ctypes.c_void_p),
        ("sent", ctypes.c_int64),
    )


class _Divisor(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p), ("counts_samples", ctypes.c_int64))


class _Round(ctypes.Structure):
    _fields_ = (
        ("epoll", ctypes.c_int32),
        ("flags", ctypes.c_int32),
        ("team", ctypes.c_void_p),
        ("num_contributors", ctypes.c_int64),
        ("contributors", ctypes.c_void_p),
        ("num_divisors", ctypes.c_int64),
        ("divisors", ctypes.c_void_p),
        ("num_tasks", ctypes.c_int64),
        ("tasks", ctypes.c_void_p),
        ("answer", ctypes.c_void_p),
        ("answer_length", ctypes.c_int64),
        ("record", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("integers", ctypes.c_int64),
        ("last_worker", ctypes.c_int64),
        ("flags_at", ctypes.c_int64),
        ("update_ms", ctypes.c_int64),
        ("kept", ctypes.c_void_p),
        ("kept_version", ctypes.c_void_p),
        ("num_slices", ctypes.c_int64),
        ("slices", ctypes.c_void_p),
        ("committed", ctypes.c_void_p),
        ("version", ctypes.c_int64),
        ("began", ctypes.c_int64),
    )


class Exchange:
    """Rounds of one hub, one after the other; use ``close`` at the end.

    Args:
        epoll: descriptor of what is waited with; all contributors' sockets must be registered for input, and anything
            else that happens to it ends the wait.
        threads: how many work on the passes.
        words: which show the versions.

    Raises:
        PassUnavailable: if it cannot be compiled here.
    """

    def __init__(self, epoll: int, threads: int, words: Words) -> None:
        library = _library()
        self._call: Callable[[Any], int] = library.pushpull_round
        self._disband = library.pushpull_disband
        self._team = library.pushpull_team(threads - 1)
        self._slices = (ctypes.c_void_p * len(words.slices))(*words.slices)
        self._round = _Round(
            epoll=epoll,
            team=self._team,
            num_slices=len(words.slices),
            slices=ctypes.addressof(self._slices),
            committed=words.committed,
        )
        self._kept: tuple[Any, ...] = ()
        self._contributors: Sequence[_Contributor] = ()
        self._pushes: list[Any] = []
        self._answer: Any = None

    def say(self, *, stop: bool, leave: bool) -> None:
        """What the next commit says; by any thread, at any time."""
        self._round.flags = UsualCommit.flags(stop=stop, leave=leave)

    def arm(self, plan: RoundPlan, expected: Sequence[Foretold]) -> None:
        """Be ready for a round: its pushes are those expected and it does what was planned."""
        about = self._round
        wanted = [_frame_head(push) for push in expected]
        lengths = [
            len(head) + ROW.size * _num_rows(push) + push.of_integers
            for head, push in zip(wanted, expected, strict=True)
        ]
        self._pushes = [ctypes.create_string_buffer(length + 1) for length in lengths]
        made = [
            _Contributor(
                socket=push.socket,
                worker=push.worker,
                length=length,
                head=len(head),
                num_rows=_num_rows(push),
                first=push.node.lo,
                wanted=head,
                push=ctypes.addressof(room),
            )
            for push, head, length, room in zip(expected, wanted, lengths, self._pushes, strict=True)
        ]
        contributors = (_Contributor * len(made))(*made)
        self._contributors = list(contributors)
        tasks = _tasks(plan.chunks)
        divisors = (_Divisor * len(plan.chunks))(*[_Divisor(*planned.divisor) for planned in plan.chunks])
        answer = frame(encode_committed(plan.record))
        self._answer = ctypes.create_string_buffer(answer, len(answer))
        about.num_contributors, about.contributors = len(made), ctypes.addressof(contributors)
        about.num_tasks, about.tasks = len(tasks.array), ctypes.addressof(tasks.array)
        about.num_divisors, about.divisors = len(plan.chunks), ctypes.addressof(divisors)
        about.answer, about.answer_length = ctypes.addressof(self._answer), len(answer)
        about.record = len(answer) - len(plan.record)
        about.rows = about.record + UsualCommit.HEADER.size
        about.integers = len(answer) - expected[0].of_integers
        about.last_worker = about.record + UsualCommit.LAST_WORKER
        about.flags_at = about.record + UsualCommit.FLAGS
        about.update_ms = about.record + UsualCommit.UPDATE_MS
        about.kept, about.kept_version, about.version, about.began = plan.kept, plan.kept_version, plan.version, 0
        self._kept = plan, wanted, contributors, tasks, divisors  # the structures have their addresses alone

    def run(self) -> bool:
        """Wait for the pushes, then sum, update, commit and tell all contributors.

        False if something else has happened, which is then still to be seen; nothing is committed.
        """
        return bool(self._call(self._round))

    @property
    def began(self) -> bool:
        """Whether memory of the new version was written in the last round."""
        return bool(self._round.began)

    @property
    def answer(self) -> bytes:
        """The frame of the commit, after a round that was done."""
        return bytes(self._answer.raw)

    @property
    def record(self) -> bytes:
        """The commit's record, likewise."""
        return bytes(self._answer.raw[self._round.record :])

    def taken(self, index: int) -> bytes | None:
        """The frame that came from a contributor; None if none did."""
        contributor = self._contributors[index]
        return bytes(self._pushes[index].raw[: contributor.length]) if contributor.here else None

    def sent(self, index: int) -> int:
        """How many bytes of the answer went to a contributor at once; -1 if it is gone."""
        return int(self._contributors[index].sent)

    def close(self) -> None:
        """End the threads."""
        if self._team:
            self._disband(self._team)
            self._team = None


def _frame_head(push: Foretold) -> bytes:
    """With what the frame of a push begins, up to the rows."""
    head = again_head(push.slot, push.step, _num_rows(push))
    return heading(len(head) + ROW.size * _num_rows(push) + push.of_integers) + head


def _num_rows(push: Foretold) -> int:
    return push.node.hi - push.node.lo


class _Tasks(NamedTuple):
    array: "ctypes.Array[_Task]"
    kept: list[Any]


def _tasks(chunks: Sequence[PlannedChunk]) -> _Tasks:
    """A task for each pass, with its chunks."""
    by_pass: dict[int, list[ctypes.Structure]] = {}
    for planned in chunks:
        address = ctypes.cast(planned.function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]
        by_pass.setdefault(address, []).append(planned.chunk)
    kept: list[Any] = []
    array = (_Task * len(by_pass))()
    for task, (function, of_pass) in zip(array, by_pass.items(), strict=True):
        addresses = (ctypes.c_void_p * len(of_pass))(*map(ctypes.addressof, of_pass))
        task.function, task.work.chunks, task.work.count = function, ctypes.addressof(addresses), len(of_pass)
        kept += [addresses, of_pass]
    return _Tasks(array, kept)


def prepare_exchange() -> bool:
    """Compile what there is to compile, so that no run waits for it; False if it cannot be done here."""
    try:
        _library()
    except PassUnavailable:
        return False
    return True


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    library = load_library(Path(__file__).with_name("exchange.c"))
    library.pushpull_round.argtypes = [ctypes.POINTER(_Round)]
    library.pushpull_round.restype = ctypes.c_int32
    library.pushpull_team.argtypes = [ctypes.c_int32]
    library.pushpull_team.restype = ctypes.c_void_p
    library.pushpull_disband.argtypes = [ctypes.c_void_p]
    library.pushpull_disband.restype = None
    return library
