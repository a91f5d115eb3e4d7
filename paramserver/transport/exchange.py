"""A round of the usual kind in one call that does not need the interpreter; see ``exchange.c``.

Usual is a step to which the same workers push the same vectors for the same tree nodes as to the one before, of which
the server knows beforehand all that is not in the rows: ``Server.plan``. They may push it in buckets, each as soon as
backward has made it. Then Python has nothing to decide between the first push and the word of the commit, and does its
part before and afterwards, while workers compute. Each push is compared with the one that was foretold, byte by byte up
to its rows; whatever differs is left to Python, which takes the rest of the step as it takes any other.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from paramserver.fused import PassUnavailable, WorkStruct, load_library
from paramserver.messages import ROW, UsualCommit
from paramserver.reduction import Node
from paramserver.round_plan import PlannedChunk, RoundPlan
from paramserver.transport.channel import frame, heading
from paramserver.transport.wire import Written, again_head, encode, encode_committed

__all__ = ["Exchange", "Foretold", "Words", "prepare_exchange"]

_WRITTEN = frame(encode(Written()))


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

    slices: Mapping[int, int]
    """By slice index."""
    committed: int


class _Task(ctypes.Structure):
    _fields_ = (("function", ctypes.c_void_p), ("work", WorkStruct))


class _Message(ctypes.Structure):
    _fields_ = (
        ("length", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("wanted", ctypes.c_char_p),
        ("push", ctypes.c_void_p),
    )


class _Contributor(ctypes.Structure):
    _fields_ = (
        ("socket", ctypes.c_int32),
        ("here", ctypes.c_int32),
        ("worker", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("messages", ctypes.c_void_p),
        ("sent", ctypes.c_int64),
    )


class _Bucket(ctypes.Structure):
    _fields_ = (
        ("num_tasks", ctypes.c_int64),
        ("tasks", ctypes.c_void_p),
        ("num_slices", ctypes.c_int64),
        ("slices", ctypes.c_void_p),
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
        ("num_buckets", ctypes.c_int64),
        ("buckets", ctypes.c_void_p),
        ("num_watchers", ctypes.c_int64),
        ("watchers", ctypes.c_void_p),
        ("written", ctypes.c_char_p),
        ("written_length", ctypes.c_int64),
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
        ("committed", ctypes.c_void_p),
        ("version", ctypes.c_int64),
        ("begun", ctypes.c_void_p),
        ("done", ctypes.c_int64),
        ("spent_ms", ctypes.c_double),
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
        self._words = words.slices
        self._round = _Round(
            epoll=epoll,
            team=self._team,
            written=_WRITTEN,
            written_length=len(_WRITTEN),
            committed=words.committed,
        )
        self._kept: tuple[Any, ...] = ()
        self._contributors: Sequence[_Contributor] = ()
        self._pushes: list[list[ctypes.Array[ctypes.c_char]]] = []
        self._answer: Any = None

    def say(self, *, stop: bool, leave: bool) -> None:
        """What the next commit says; by any thread, at any time."""
        self._round.flags = UsualCommit.flags(stop=stop, leave=leave)

    def arm(self, plan: RoundPlan, expected: Sequence[Sequence[Foretold]], watchers: Sequence[int]) -> None:
        """Be ready for a round: its pushes are those expected and it does what was planned.

        Args:
            plan: of the server.
            expected: for each contributor what it pushes, bucket by bucket.
            watchers: descriptors of the sockets of those who are told when a bucket has the new version.
        """
        about = self._round
        made = [_messages(of_contributor) for of_contributor in expected]
        self._pushes = [messages.rooms for messages in made]
        contributors = (_Contributor * len(made))()
        for contributor, messages, (push, *_) in zip(contributors, made, expected, strict=True):
            contributor.socket, contributor.worker = push.socket, push.worker
            contributor.num_rows, contributor.first = _num_rows(push), push.node.lo
            contributor.messages = ctypes.addressof(messages.array)
        self._contributors = list(contributors)
        buckets = (_Bucket * len(plan.buckets))()
        kept: list[Any] = [made, contributors, buckets]
        for bucket, planned in zip(buckets, plan.buckets, strict=True):
            tasks = _tasks(planned.chunks)
            words = (ctypes.c_void_p * len(planned.slices))(*[self._words[index] for index in planned.slices])
            bucket.num_tasks, bucket.tasks = len(tasks.array), ctypes.addressof(tasks.array)
            bucket.num_slices, bucket.slices = len(words), ctypes.addressof(words)
            kept += [tasks, words]
        places = [planned.divisor for bucket in plan.buckets for planned in bucket.chunks]
        divisors = (_Divisor * len(places))(*[_Divisor(*place) for place in places])
        told = (ctypes.c_int32 * len(watchers))(*watchers)
        answer = frame(encode_committed(plan.record))
        self._answer = ctypes.create_string_buffer(answer, len(answer))
        about.num_contributors, about.contributors = len(made), ctypes.addressof(contributors)
        about.num_buckets, about.buckets = len(buckets), ctypes.addressof(buckets)
        about.num_divisors, about.divisors = len(divisors), ctypes.addressof(divisors)
        about.num_watchers, about.watchers = len(told), ctypes.addressof(told)
        about.answer, about.answer_length = ctypes.addressof(self._answer), len(answer)
        about.record = len(answer) - len(plan.record)
        about.rows = about.record + UsualCommit.HEADER.size
        about.integers = len(answer) - expected[0][0].of_integers
        about.last_worker = about.record + UsualCommit.LAST_WORKER
        about.flags_at = about.record + UsualCommit.FLAGS
        about.update_ms = about.record + UsualCommit.UPDATE_MS
        about.kept, about.kept_version, about.version = plan.kept, plan.kept_version, plan.version
        about.begun, about.done, about.spent_ms = plan.begun, 0, 0.0
        self._kept = plan, divisors, told, *kept  # the structures have their addresses alone

    def run(self) -> bool:
        """Wait for the pushes, then sum, update, commit and tell all contributors.

        False if something else has happened, which is then still to be seen; nothing is committed.
        """
        return bool(self._call(self._round))

    @property
    def done(self) -> int:
        """How many buckets stand at the new version after the last round, given up or not."""
        return int(self._round.done)

    @property
    def spent_s(self) -> float:
        """Seconds on the clock that their update took."""
        return 1e-3 * float(self._round.spent_ms)

    @property
    def answer(self) -> bytes:
        """The frame of the commit, after a round that was done."""
        return bytes(self._answer.raw)

    @property
    def record(self) -> bytes:
        """The commit's record, likewise."""
        return bytes(self._answer.raw[self._round.record :])

    def taken(self, index: int) -> list[bytes]:
        """The frames that came from a contributor."""
        here = self._contributors[index].here
        return [bytes(room.raw[:-1]) for room in self._pushes[index][:here]]

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


class _Messages(NamedTuple):
    array: "ctypes.Array[_Message]"
    rooms: "list[ctypes.Array[ctypes.c_char]]"
    """Where each is taken to, with a byte to spare."""


def _messages(pushes: Sequence[Foretold]) -> _Messages:
    """What comes from one contributor."""
    heads = [_frame_head(push) for push in pushes]
    lengths = [
        len(head) + ROW.size * _num_rows(push) + push.of_integers for head, push in zip(heads, pushes, strict=True)
    ]
    rooms = [ctypes.create_string_buffer(length + 1) for length in lengths]
    array = (_Message * len(pushes))(
        *[
            _Message(length, len(head), head, ctypes.addressof(room))
            for length, head, room in zip(lengths, heads, rooms, strict=True)
        ]
    )
    return _Messages(array, rooms)


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
