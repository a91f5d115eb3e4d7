"""Transport between a worker actor and server actors: Ray calls, tensors as zero-copy NumPy arrays in its store."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import ray
import ray.exceptions
import torch
from torch import Tensor

from paramserver.checksums import crc32_of
from paramserver.error_feedback import ErrorFeedback
from paramserver.errors import CorruptTransfer, ServerLost, StepTimeout
from paramserver.integers import IntegerBlock
from paramserver.messages import Commit, Hello, Push
from paramserver.partition import Slice

__all__ = ["POLL_S", "RayTransport", "WireArrival", "WireBatch", "WirePush", "from_wire", "to_wire"]

_LOOK_S = 1.0
"""How often a wait looks at pushes that were sent meanwhile."""
_ANSWER_S = 5.0
_REPEAT_S = 10.0
"""A push that was not answered for so long is sent again."""
_MAX_REPEATS = 3
"""How often a push is sent again that was damaged on the way."""
POLL_S = 10.0
"""A server says so if nothing is new for so long."""
_UNDER_WAY_BYTES = 8 << 20
"""What is asked for comes behind everything that is under way: more of it would keep a server's slices from coming back
while others go up (8 MiB take 70 ms at 1 Gb/s)."""


class WirePush(NamedTuple):
    """A push as it travels: NumPy arrays, which Ray copies once, where it copies tensors twice."""

    push: Push
    """Without its slices."""
    slices: dict[int, Any]
    checksums: Mapping[int, int]
    """CRC-32 of each array."""
    rounded_to: str | None = None
    """``bfloat16`` or ``float16``, whose bits the int16 arrays among the slices hold: NumPy does not know the first."""


def to_wire(push: Push, feedback: ErrorFeedback | None = None) -> WirePush:
    """The push for the way, rounded if there is error feedback; its memory is copied when Ray takes it."""
    rounded = feedback.round(push) if feedback is not None else {}
    slices = {
        index: rounded[index].view(torch.int16).numpy() if index in rounded else value.numpy()
        for index, value in push.slices.items()
    }
    bare = push._replace(slices={}, integers=IntegerBlock.pack(push.integers))
    checksums = {index: crc32_of(array) for index, array in slices.items()}
    return WirePush(bare, slices, checksums, None if feedback is None else str(feedback.dtype).removeprefix("torch."))


def from_wire(wire: WirePush) -> Push:
    """The push in fp32, as it was or widened again.

    What was not rounded shares the arrays' read-only memory: nobody may write it.

    Raises:
        CorruptTransfer: if a slice is not what was sent.
    """
    for index, array in wire.slices.items():
        _check(array, wire.checksums[index], f"push of worker {wire.push.worker} for step {wire.push.step}", index)
    return wire.push._replace(slices={index: _widened(value, wire) for index, value in wire.slices.items()})


def _check(array: Any, wanted: int, what: str, index: int) -> None:
    if crc32_of(array) != wanted:
        raise CorruptTransfer(f"{what}: slice {index} is not what was sent (its CRC-32 differs): the line is damaged")


def _widened(value: Any, wire: WirePush) -> Tensor:
    tensor = torch.from_numpy(value)
    if wire.rounded_to is None or tensor.dtype != torch.int16:
        return tensor
    return tensor.view(getattr(torch, wire.rounded_to)).float()


class WireBatch(NamedTuple):
    """Slices of a version that were put into Ray's object store together."""

    indices: tuple[int, ...]
    reference: list[Any]
    """Of their arrays; in a list, since Ray would fetch it at once otherwise."""
    checksums: tuple[int, ...]
    """CRC-32 of each."""


class WireArrival(NamedTuple):
    """What a server has of a version beyond what its caller has."""

    batches: "list[WireBatch]"
    commit: Commit | None
    """Once the version is committed; no more batches follow."""
    integers: Mapping[str, Tensor]
    """Integer buffers of a committed version."""


class _Sent(NamedTuple):
    """A push that was not answered yet."""

    wire: WirePush
    size: int
    at: float
    """When it was sent."""
    repeated: int = 0
    """How often it came otherwise than it was sent."""


class _MaybeTaken(ServerLost):
    """The line to a server broke: what was asked of it may have been done, or not."""


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
        feedback: rounds what is pushed, if anything does.
        timeout_s: deadline of a wait for the wire, in seconds (``--step-timeout``).
    """

    def __init__(self, servers: Sequence[Any], feedback: ErrorFeedback | None = None, timeout_s: float = 300.0) -> None:
        self.num_servers = len(servers)
        self._feedback = feedback
        self._timeout_s = timeout_s
        self._servers = list(servers)
        self._pushes: list[dict[Any, _Sent]] = [{} for _ in servers]
        self._arrived: dict[int, _Version] = {}
        self._generations: dict[int, int] = {}

    @property
    def versions(self) -> None:
        """See ``Transport.versions``: they come as copies."""

    def hello(self, server: int, timeout_s: float) -> Hello:
        """See ``Transport.hello``."""
        reply: Hello = self._get(server, self._servers[server].hello.remote(), timeout_s, "say hello")
        self._generations[server] = reply.generation
        return reply

    def allocate(self, numel: int) -> Tensor:
        """See ``Transport.allocate``: Ray copies whatever it sends."""
        return torch.zeros(numel)

    def push(self, server: int, push: Push) -> None:
        """See ``Transport.push``: the tensors are copied before this returns."""
        wire = to_wire(push, self._feedback)
        size = sum(array.nbytes for array in wire.slices.values())
        self._make_room(server, size)
        self._send(server, _Sent(wire, size, time.monotonic()))

    def prepare(self, server: int, push: Push) -> Callable[[], None]:
        """See ``Transport.prepare``."""
        return partial(self.push, server, push)

    def _send(self, server: int, sent: "_Sent") -> None:
        self._pushes[server][self._servers[server].push.remote(sent.wire)] = sent

    def _repeat(self, server: int) -> None:
        """Send again what was not answered for long: the answer may be lost, and a repetition does no harm."""
        now = time.monotonic()
        for reference, sent in list(self._pushes[server].items()):
            if now - sent.at > _REPEAT_S and self._pushes[server].pop(reference, None) is not None:
                self._send(server, sent._replace(at=now))

    def _make_room(self, server: int, size: int) -> None:
        """Wait until a push of ``size`` bytes and those under way do not keep the wire from anything else for long."""
        deadline = time.monotonic() + self._timeout_s
        while sent := dict(self._pushes[server]):
            if sum(push.size for push in sent.values()) + size <= _UNDER_WAY_BYTES:
                return
            ready, _ = ray.wait(list(sent), num_returns=1, timeout=_LOOK_S)
            for push in ready:
                self._settle(server, push, self._timeout_s)
            self._repeat(server)
            if time.monotonic() > deadline:
                raise StepTimeout(
                    f"server {server} did not take a push within {self._timeout_s:.0f} s (--step-timeout)",
                    server=server,
                )

    def wait(self, server: int, version: int, timeout_s: float) -> Commit:
        """See ``Transport.wait``."""
        for _ in self.arrivals(server, version, timeout_s):
            pass
        ready, _ = (
            ray.wait(sent, num_returns=len(sent), timeout=0) if (sent := list(self._pushes[server])) else ([], [])
        )
        for push in ready:
            self._settle(server, push, timeout_s)
        self._pushes[server].clear()  # the step is committed, whatever became of an answer
        commit = self._arrived[server].commit
        assert commit is not None
        if commit.skipped and self._feedback is not None:
            self._feedback.take_back(commit.version - 1)
        return commit

    def arrivals(self, server: int, version: int, timeout_s: float) -> Iterator[Mapping[int, Tensor]]:
        """See ``Carrier.arrivals``."""
        arrived = self._arrived.get(server)
        if arrived is not None and arrived.version >= version and arrived.commit is not None:
            return
        deadline = time.monotonic() + timeout_s
        slices: dict[int, Tensor] = {}
        batches = 0
        asked = self._ask(server, version, batches, timeout_s, timeout_s)
        while True:
            arrival = self._answer(server, version, asked, deadline, timeout_s)
            if arrival is None:  # its answer is lost
                asked = self._ask(server, version, batches, deadline - time.monotonic(), timeout_s)
                continue
            batches += len(arrival.batches)
            if arrival.commit is None:  # before the tensors are fetched: the way takes as long as a small batch
                asked = self._ask(server, version, batches, deadline - time.monotonic(), timeout_s)
            for batch in self._tensors(server, version, arrival):
                slices.update(batch)
                yield batch
            if arrival.commit is not None:
                self._arrived[server] = _Version(arrival.commit.version, slices, arrival.commit, arrival.integers)
                return

    def _tensors(self, server: int, version: int, arrival: WireArrival) -> Iterator[dict[int, Tensor]]:
        """The batches of an arrival, which share the memory of Ray's object store."""
        for indices, (reference,), checksums in arrival.batches:
            arrays = self._get(server, reference, self._timeout_s, f"send version {version}")
            for index, array, wanted in zip(indices, arrays, checksums, strict=True):
                _check(array, wanted, f"version {version} from server {server}", index)
            yield {index: torch.from_numpy(array) for index, array in zip(indices, arrays, strict=True)}

    def _ask(self, server: int, version: int, have: int, left_s: float, timeout_s: float) -> Any:
        generation = self._generations.get(server, 0)
        return self._servers[server].arrivals.remote(generation, version, have, max(0.0, left_s), timeout_s)

    def _answer(self, server: int, version: int, asked: Any, deadline: float, timeout_s: float) -> WireArrival | None:
        # The server keeps the deadline itself, and knows what it waits for: give it a moment longer to say so. It
        # says so in between, too, when nothing is new.
        patience = time.monotonic() + POLL_S + _ANSWER_S
        while time.monotonic() < deadline + _ANSWER_S:
            if time.monotonic() > patience:
                return None
            ready, _ = ray.wait([asked, *self._pushes[server]], num_returns=1, timeout=_LOOK_S)
            if asked in ready:
                break
            for push in ready:  # it was taken, or refused
                self._settle(server, push, timeout_s)
            self._repeat(server)
        arrival: WireArrival = self._get(server, asked, 0.0, f"commit version {version}", said_s=timeout_s)
        return arrival

    def _settle(self, server: int, push: Any, timeout_s: float) -> None:
        if (sent := self._pushes[server].pop(push, None)) is None:  # a relay's other thread was quicker
            return
        try:
            self._get(server, push, timeout_s, "take a push")
        except _MaybeTaken:
            self._send(server, sent._replace(at=time.monotonic()))
        except CorruptTransfer:
            if sent.repeated == _MAX_REPEATS:
                raise
            self._send(server, sent._replace(at=time.monotonic(), repeated=sent.repeated + 1))

    def fetch(self, server: int, version: int, timeout_s: float) -> tuple[Sequence[Tensor], Mapping[str, Tensor]]:
        """See ``Transport.fetch``."""
        arrived = self._arrived.get(server)
        if arrived is None or arrived.version != version:  # at the start, or of a server that is one ahead
            published: WireArrival = self._get(
                server, self._servers[server].publish.remote(version), timeout_s, "publish"
            )
            slices: dict[int, Tensor] = {}
            for batch in self._tensors(server, version, published):
                slices.update(batch)
            arrived = self._arrived[server] = _Version(version, slices, None, published.integers)
        return [arrived.slices[index] for index in sorted(arrived.slices)], arrived.integers

    def await_slices(self, version: int, pieces: Sequence[Slice], timeout_s: float) -> None:
        """See ``Transport.await_slices``; there are no ``versions`` here."""
        for server in {piece.server for piece in pieces}:
            self.wait(server, version, timeout_s)

    def _get(self, server: int, reference: Any, timeout_s: float, what: str, said_s: float | None = None) -> Any:
        try:
            return ray.get(reference, timeout=timeout_s)
        except ray.exceptions.GetTimeoutError:
            waited_s = timeout_s if said_s is None else said_s
            raise StepTimeout(
                f"server {server} did not {what} within {waited_s:.0f} s (--step-timeout)", server=server
            ) from None
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.ActorUnavailableError:
            raise _MaybeTaken(f"server {server} could not be reached to {what}", server=server) from None
        except ray.exceptions.RayActorError:
            raise ServerLost(f"server {server} is gone: it could not {what}", server=server) from None

    def note(self, worker: int, word: int) -> None:
        """See ``Transport.note``."""

    def close(self) -> None:
        """See ``Transport.close``."""
        self._arrived.clear()
