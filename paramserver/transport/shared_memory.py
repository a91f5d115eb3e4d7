"""A worker's way to servers of its own machine: arenas both sides map, and a socket that says when to look.

A push sends the places of its tensors, a commit the version number: no tensor is copied, and nobody polls. Vectors
that ``allocate`` gave out lie in an arena already; any other tensor is copied into one first.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from paramserver.arena import DEFAULT_ARENA_DIR, Arena
from paramserver.errors import ServerLost, StepTimeout, VersionGone
from paramserver.integers import IntegerBlock
from paramserver.messages import Commit, FlatSlices, Hello, Push
from paramserver.partition import Partition, Slice
from paramserver.transport.channel import Address, Channel, connect, frame
from paramserver.transport.versions import VersionsArena
from paramserver.transport.wire import (
    Arrival,
    AskCommit,
    AskMissing,
    AttachArena,
    Committed,
    Failed,
    Missing,
    Place,
    VectorPlace,
    Watch,
    Welcome,
    encode,
    encode_again,
    encode_lasting,
)

__all__ = ["SharedMemoryTransport"]

_CONNECT_S = 30.0
_ANSWER_S = 5.0
_SLOTS = 256
"""Kinds of pushes of which a hub is asked to keep what is the same in every step: more than a worker usually has."""
_LOOK_S = 2.0
"""How often a wait looks whether what it waits for has come without a word."""


@dataclass
class _Line:
    """The connection to one server's hub and what it said last."""

    server: int
    channel: Channel
    hello: Hello
    arena: Arena
    partition: Partition
    version: int
    integers: Mapping[int, Mapping[str, Tensor]]
    commit: Commit | None = None
    watched: bool = False
    """Whether the hub was asked to say when slices have their next version."""
    slots: dict[bytes, int] = field(default_factory=dict)
    """Where the hub keeps what is the same in every step, by what that is."""

    @cached_property
    def versions(self) -> VersionsArena:
        """Mapped at first use: only then the client has seen that both sides cut the parameters alike."""
        return VersionsArena(self.arena, self.partition)

    @cached_property
    def slices(self) -> tuple[list[Tensor], list[Tensor]]:
        """The server's slices of both versions."""
        pieces = self.partition.by_server[self.server]
        first, second = self.versions.vectors
        return [first[p.start : p.stop] for p in pieces], [second[p.start : p.stop] for p in pieces]


@dataclass
class _Staging:
    """An arena for tensors that lie in none, and the step they belong to."""

    index: int
    arena: Arena
    step: int = field(default=-1)


class SharedMemoryTransport:
    """One worker's way to the servers of its machine.

    Args:
        addresses: of the servers' hubs, by server.
        partition: of the run.
        folder: where arenas are made.
    """

    def __init__(
        self, addresses: Mapping[int, Address], partition: Partition, folder: Path = DEFAULT_ARENA_DIR
    ) -> None:
        self.num_servers = partition.num_servers
        self._partition = partition
        self._folder = folder
        self._arenas: list[Arena] = []
        self._starts: list[int] = []
        self._staging: list[_Staging] = []
        self._lines: dict[int, _Line] = {}
        self._sending = threading.Lock()  # one thread may push while another one waits, and asks why it has to
        try:
            for server, address in addresses.items():
                self._lines[server] = self._connect(server, address)
        except BaseException:
            self.close()
            raise

    def _connect(self, server: int, address: Address) -> _Line:
        try:
            channel = connect(address, _CONNECT_S)
            welcome, (descriptor,) = channel.receive(_CONNECT_S)
        except (OSError, EOFError) as error:
            raise ServerLost(f"server {server} is gone: its socket does not answer", server=server) from error
        assert isinstance(welcome, Welcome)
        arena, hello = Arena.attach(descriptor), welcome.hello
        return _Line(server, channel, hello, arena, self._partition, hello.version, welcome.integers, hello.last)

    @cached_property
    def versions(self) -> tuple[Tensor, Tensor] | None:
        """See ``Transport.versions``: what the servers write is read in place."""
        if len(self._lines) < self.num_servers:
            return None
        first = next(iter(self._lines.values())).versions
        shared = all(line.versions.identity == first.identity for line in self._lines.values())
        return first.vectors if shared else None

    def hello(self, server: int, timeout_s: float) -> Hello:
        """See ``Transport.hello``."""
        return self._lines[server].hello

    def allocate(self, numel: int) -> Tensor:
        """See ``Transport.allocate``: the vector lies in an arena that every server has mapped."""
        _, arena = self._new_arena(4 * numel)
        return arena.tensor(0, numel)

    def _new_arena(self, num_bytes: int) -> tuple[int, Arena]:
        arena = Arena.create(num_bytes, self._folder)
        index = len(self._arenas)
        for server in self._lines:
            self._tell(server, AttachArena(index), [arena.descriptor])
        arena.close()  # the mappings keep it
        self._arenas.append(arena)
        self._starts.append(arena.tensor(0, 1).data_ptr())  # an empty one has no address
        return index, arena

    @property
    def arena_bytes(self) -> int:
        """Shared memory that this worker made."""
        return sum(arena.num_bytes for arena in self._arenas)

    def push(self, server: int, push: Push) -> None:
        """See ``Transport.push``."""
        arrival = self._in_arena(push)
        if arrival is None:
            places = {index: self._place(values, push.step) for index, values in push.slices.items()}
            arrival = _arrival(push, places)
        self._send_arrival(server, arrival)

    def prepare(self, server: int, push: Push) -> Callable[[], None]:
        """See ``Transport.prepare``: for a vector that lies in an arena a ready-made message is left to be sent."""
        if (arrival := self._in_arena(push)) is None:
            return partial(self.push, server, push)
        slot = self._lines[server].slots.get(encode_lasting(arrival))
        if slot is None:
            return partial(self._send_arrival, server, arrival)
        return partial(self._send, server, frame(encode_again(arrival.push, slot)))

    def _in_arena(self, push: Push) -> Arrival | None:
        """What says where the slices lie, if they are of one vector in an arena."""
        if not isinstance(push.slices, FlatSlices) or (place := self._find(push.slices.flat)) is None:
            return None
        return _arrival(push, VectorPlace(place, tuple(piece.index for piece in push.slices.pieces)))

    def _send_arrival(self, server: int, arrival: Arrival) -> None:
        slots = self._lines[server].slots
        lasting = encode_lasting(arrival)
        if (slot := slots.get(lasting)) is not None:
            self._send(server, frame(encode_again(arrival.push, slot)))
            return
        if len(slots) < _SLOTS:
            arrival = arrival._replace(slot=slots.setdefault(lasting, len(slots)))
        self._send(server, frame(encode(arrival)))

    def _find(self, values: Tensor) -> Place | None:
        """Where a tensor lies, if it is in an arena."""
        address, size = values.data_ptr(), values.numel() * values.element_size()
        for index, start in enumerate(self._starts):
            if start <= address and address + size <= start + self._arenas[index].num_bytes:
                return Place(index, address - start, values.numel(), _name(values.dtype))
        return None

    def _place(self, values: Tensor, step: int) -> Place:
        if place := self._find(values):
            return place
        staging = self._stage(values.numel() * values.element_size(), step)
        staging.arena.tensor(0, values.numel(), values.dtype).copy_(values)
        return Place(staging.index, 0, values.numel(), _name(values.dtype))

    def _stage(self, num_bytes: int, step: int) -> _Staging:
        oldest = min(line.version for line in self._lines.values())
        for staging in self._staging:
            if staging.step < oldest and staging.arena.num_bytes >= num_bytes:
                staging.step = step
                return staging
        self._staging.append(_Staging(*self._new_arena(num_bytes), step))
        return self._staging[-1]

    def wait(self, server: int, version: int, timeout_s: float) -> Commit:
        """See ``Transport.wait``."""
        line = self._lines[server]
        if line.version < version or line.commit is None:
            self._await_commit(line, version, timeout_s)
        if not line.channel.idle:
            self._listen_to_errors(server)
        assert line.commit is not None
        return line.commit

    def _await_commit(self, line: _Line, version: int, timeout_s: float) -> None:
        server, deadline = line.server, time.monotonic() + timeout_s
        while line.version < version or line.commit is None:
            try:
                self._listen(server, min(deadline, time.monotonic() + _LOOK_S))
            except TimeoutError:
                if line.versions.committed(server) >= version:
                    self._tell(server, AskCommit())  # word of it is lost
                elif time.monotonic() >= deadline:
                    raise self._late(server, version, timeout_s) from None

    def await_slices(self, version: int, pieces: Sequence[Slice], timeout_s: float) -> None:
        """See ``Transport.await_slices``."""
        deadline = time.monotonic() + timeout_s
        for piece in pieces:
            line = self._lines[piece.server]
            while not line.versions.has(piece, version):
                if not line.watched:
                    line.watched = True
                    self._tell(piece.server, Watch())
                    continue
                look = min(deadline, time.monotonic() + _LOOK_S)
                try:
                    line.channel.await_input(look - time.monotonic())
                    if not line.versions.has(piece, version):  # else who waits for the commit may read what it says
                        self._listen(piece.server, look)
                except TimeoutError:  # or word of it is lost
                    if time.monotonic() >= deadline:
                        raise self._late(piece.server, version, timeout_s) from None

    def _late(self, server: int, version: int, timeout_s: float) -> StepTimeout:
        deadline = time.monotonic() + _ANSWER_S
        self._tell(server, AskMissing())
        try:
            while not isinstance(answer := self._listen(server, deadline), Missing):
                pass
        except TimeoutError:
            return StepTimeout(
                f"step {version}: server {server} did not answer within {timeout_s + _ANSWER_S:.0f} s (--step-timeout)",
                server=server,
            )
        return StepTimeout(
            f"step {version}: server {server} waits for microbatches {answer.microbatches} "
            f"since {timeout_s:.0f} s (--step-timeout)",
            server=server,
        )

    def fetch(self, server: int, version: int, timeout_s: float) -> tuple[Sequence[Tensor], Mapping[str, Tensor]]:
        """See ``Transport.fetch``."""
        line = self._lines[server]
        committed = line.versions.committed(server)
        if line.version < version <= committed:
            deadline = time.monotonic() + timeout_s
            while line.version < version <= committed:
                try:
                    self._listen(server, deadline)
                except TimeoutError:
                    raise self._late(server, version, timeout_s) from None
        if version not in line.integers or version < committed - 1:
            raise VersionGone(f"server {server} has version {committed}, not {version}")
        return line.slices[version % 2], line.integers[version]

    def _listen(self, server: int, deadline: float) -> object:
        """Take one message in; raises the error that it holds."""
        try:
            message, _ = self._lines[server].channel.receive(deadline - time.monotonic())
        except (EOFError, KeyError):  # KeyError: this side was closed while another thread of it waited
            raise self._lost(server) from None
        self._understand(server, message)
        return message

    def _understand(self, server: int, message: object) -> None:
        if isinstance(message, Committed):
            line, commit = self._lines[server], message.commit
            line.version, line.commit = commit.version, commit
            line.integers = {commit.version: message.integers}
        elif isinstance(message, Failed):
            raise message.error

    def _listen_to_errors(self, server: int) -> None:
        """Raise an error that came behind the commit that was waited for."""
        while (found := self._lines[server].channel.arrived()) is not None:
            self._understand(server, found[0])

    def _tell(self, server: int, message: object, descriptors: Sequence[int] = ()) -> None:
        self._send(server, frame(encode(message), len(descriptors)), descriptors)

    def _send(self, server: int, message: bytes, descriptors: Sequence[int] = ()) -> None:
        try:
            with self._sending:
                self._lines[server].channel.send_frame(message, descriptors)
        except OSError:
            raise self._lost(server) from None

    def _lost(self, server: int) -> ServerLost:
        return ServerLost(f"server {server} is gone: it closed its socket", server=server)

    def note(self, worker: int, word: int) -> None:
        """See ``Transport.note``."""
        for line in self._lines.values():
            line.versions.note(worker, word)
            return

    def close(self) -> None:
        """See ``Transport.close``."""
        for line in self._lines.values():
            line.channel.close()
        self._lines.clear()
        self.__dict__.pop("versions", None)  # it would keep the arena


def _arrival(push: Push, slices: Mapping[int, Place] | VectorPlace) -> Arrival:
    return Arrival(push._replace(slices={}, integers=IntegerBlock.of(push.integers)), slices)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
