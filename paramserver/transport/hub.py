"""The server's side of shared memory: one thread that owns the ``Server``, talks to workers and hands out slices.

All of the server's state is touched by this thread alone; others (Ray's calls, the vote) reach it by ``call``. While it
updates, helper threads share one pass with it or take slices from the same list: neither needs the interpreter. A step
that is pushed as the one before was is taken whole without it; see ``usual``.
"""

import contextlib
import os
import queue
import select
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from paramserver.arena import Arena
from paramserver.errors import PushPullError, ServerLost
from paramserver.messages import Commit, Push
from paramserver.partition import Slice
from paramserver.team import Team
from paramserver.transport.channel import Address, Channel, frame, listen
from paramserver.transport.news import News
from paramserver.transport.peer import Peer
from paramserver.transport.served import Served
from paramserver.transport.usual import usual_rounds
from paramserver.transport.versions import VersionsArena
from paramserver.transport.wire import (
    Arenas,
    AskArenas,
    AskCommit,
    AskMissing,
    AttachArena,
    Committed,
    Failed,
    Heard,
    Missing,
    Watch,
    Welcome,
    Written,
    encode,
    encode_committed,
)

__all__ = ["Hub"]

T = TypeVar("T")

_THRESHOLDS = 3
_LEAST_ELEMENTS = 1 << 20
"""4 MiB: for less nobody is told before the commit."""


class Hub:
    """Serves one ``Server`` to the workers of its machine; use ``close`` at the end.

    Args:
        server: or what stands for one; from now on touched by this object's thread alone. Its memory is that of
            ``versions``.
        versions: the arena that workers map.
        threads: how many threads sum and update.
        before_update: called in the hub's thread before slices are updated, to take a vote that is due.
        on_change: called in the hub's thread after every commit, and with None after a failure.
        least_elements: how many slices' elements it takes to call ``on_written``; waiting workers are told of a third.
        own: the server's own arena, shown to keepers.
        on_stage: called in the hub's thread with step and stage, when something is first summed, when something was
            updated, and when a version is committed but nobody was told; if it gives ``drop-response``, nobody is.
        foretell: whether steps may be taken without the interpreter, where there is a compiler.
    """

    def __init__(
        self,
        server: Served,
        versions: VersionsArena,
        *,
        threads: int = 1,
        before_update: Callable[[], None] = lambda: None,
        on_change: Callable[[Commit | None], None] = lambda _: None,
        least_elements: int = _LEAST_ELEMENTS,
        own: Arena | None = None,
        on_stage: Callable[[int, str], object] | None = None,
        foretell: bool = True,
    ) -> None:
        self.failure: BaseException | None = None
        """What ended the run here, once something has."""
        self.last = server.last
        """The commit of the current version, once one was made."""
        self._stop = self._leave = False
        self.before_word: Callable[[Commit], None] | None = None
        """Called in the hub's thread with a commit before anybody hears of it."""
        self._server = server
        self._on_stage = on_stage
        self._seen = (0, "")
        self.own = own
        self.versions = versions
        self._before_update = before_update
        self._on_change = on_change
        self._on_written: Callable[[int, Sequence[Slice]], None] | None = None
        self._watched = False
        self._pieces = server.partition.by_server[server.index]
        self._scratches = [server.new_scratch() for _ in range(threads)]
        self._team = Team(threads, f"hub-{server.index}")
        self._peers: dict[int, Peer] = {}
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._listener, self.address = listen()
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {
            self._wake: self._run_calls,
            self._listener.fileno(): self._accept,
        }
        for descriptor in self._handlers:
            self._epoll.register(descriptor, select.EPOLLIN)
        self._usual = usual_rounds(server, self._pieces, versions, self._epoll.fileno(), threads) if foretell else None
        self._closed = threading.Event()
        self._gate = threading.Lock()
        self._gone = False
        third = -(-sum(piece.numel for piece in self._pieces) // _THRESHOLDS)
        self._news_for_peers = News(self._pieces, versions, max(least_elements, third))
        self._news_for_owner = News(self._pieces, versions, least_elements)
        versions.mark(self._pieces, server.version)
        versions.commit(server.index, server.version)
        self._thread = threading.Thread(target=self._serve, name=f"hub-{server.index}", daemon=True)
        self._thread.start()

    address: Address
    """Where workers connect."""

    @property
    def on_written(self) -> Callable[[int, Sequence[Slice]], None] | None:
        """Called in the hub's thread with a version and slices that have it before it is committed; costs nothing while
        it is None and no worker waits for slices."""
        return self._on_written

    @on_written.setter
    def on_written(self, function: Callable[[int, Sequence[Slice]], None] | None) -> None:
        asked, self._on_written = self._on_written is not None, function
        if function is not None and not asked:
            self.call(lambda: None)  # a step may be under way in which nobody is asked

    @property
    def stop(self) -> bool:
        """Whether the version committed next is to be the run's last."""
        return self._stop

    @stop.setter
    def stop(self, value: bool) -> None:
        self._stop = value
        self._say()

    @property
    def leave(self) -> bool:
        """Whether workers are to come back after it, since the membership changes."""
        return self._leave

    @leave.setter
    def leave(self, value: bool) -> None:
        self._leave = value
        self._say()

    def _say(self) -> None:
        if self._usual is not None:
            self._usual.say(stop=self._stop, leave=self._leave)

    # -- from other threads ------------------------------------------------------------------------------------------

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run ``function`` in the hub's thread, which alone may touch the server."""
        future: Future[T] = Future()
        with self._gate:
            if self._gone:  # the descriptor may be somebody else's by now
                future.set_exception(ServerLost(f"server {self._server.index} is closed"))
            else:
                self._calls.put((function, future))
                os.eventfd_write(self._wake, 1)
        return future

    def push(self, push: Push) -> "Future[None]":
        """Take a contribution that came another way than by a socket."""
        return self.call(lambda: self._server.push(push))

    def fail(self, error: BaseException) -> None:
        """End the run here: tell all workers."""
        self.call(lambda: self._fail(error))

    def written(self, pieces: Sequence[Slice], version: int) -> None:
        """Somebody else has written slices at the version that is committed next."""
        self.versions.mark(pieces, version)
        self.call(lambda: self._tell_written(version, bucket=True))

    def close(self) -> None:
        """Stop the thread and give sockets back; arenas go with their last user."""
        if not self._closed.is_set():
            self.call(self._shut).result()
            self._thread.join()
            self._team.close()
            if self._usual is not None:
                self._usual.close()
            with self._gate:
                self._gone = True
                os.close(self._wake)

    # -- the hub's thread --------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while not self._closed.is_set():
            try:
                if self._take_usual():
                    continue
                for descriptor, events in self._epoll.poll():
                    if self._closed.is_set():
                        return
                    if (peer := self._peers.get(descriptor)) is not None:
                        self._hear(peer, events)
                    elif (handler := self._handlers.get(descriptor)) is not None:
                        handler()
            except BaseException as error:  # nobody else would hear of it, and all would wait
                self._fail(error)
            if not self._closed.is_set():
                self._advance()

    def _take_usual(self) -> bool:
        """Take the open step whole, if it is as foretold; True if something was done, so that it is asked again."""
        usual = self._usual
        asked = self._on_stage or self.on_written or self.before_word
        if usual is None or asked or self.failure is not None or not usual.arm(self._peers):
            return False
        if usual.run():
            self._conclude()
            return True
        if came := usual.take_back():
            self._wall += usual.spent_s
            self._scratches[0].busy["update"] += usual.spent_s
            for peer, heard in came:
                self._answer(peer, heard, [])
            self._advance()  # it may be that nothing else comes
        return bool(came)

    def _conclude(self) -> None:
        """The server's part of a step that was taken whole, while workers go on."""
        assert self._usual is not None
        message, sent = self._usual.answer, self._usual.sent()
        for descriptor, peer in list(self._peers.items()):
            if (count := sent.get(descriptor, 0)) < 0:
                self._drop(peer)
            elif count < len(message):
                self._tell(peer, message[count:])
        commit = self.last = self._usual.conclude()
        self._on_change(commit)
        self._begin_step()
        self._server.open_step()

    def _shut(self) -> None:
        self._closed.set()
        self._epoll.close()
        self._listener.close()
        for peer in self._peers.values():
            peer.channel.close()
        self._peers.clear()

    def _run_calls(self) -> None:
        os.eventfd_read(self._wake)
        with contextlib.suppress(queue.Empty):
            while True:
                function, future = self._calls.get_nowait()
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)

    def _accept(self) -> None:
        channel = Channel.accept(self._listener, self.address[1])
        if channel is None:
            return
        peer = Peer(channel)
        server = self._server
        versions = (version for version in (server.version - 1, server.version) if server.readable(version))
        welcome = Welcome(server.hello(), {version: server.integers(version) for version in versions})
        try:
            channel.send(welcome, [self.versions.arena.descriptor])
            if self.failure is not None:
                channel.send(Failed(self.failure))
        except OSError:
            channel.close()
            return
        self._peers[channel.fileno()] = peer
        self._epoll.register(channel.fileno(), select.EPOLLIN)

    def _hear(self, peer: Peer, events: int) -> None:
        try:
            if events & select.EPOLLOUT:
                peer.channel.flush()
                self._await_room(peer)
            if events & ~select.EPOLLOUT:  # the end of the connection is read like a message
                while (found := peer.channel.take()) is not None:
                    self._answer(peer, *found)
        except (EOFError, OSError):
            self._drop(peer)

    def _answer(self, peer: Peer, message: object, descriptors: list[int]) -> None:
        if isinstance(message, Heard):
            try:
                self._server.push(peer.find(message, self._pieces))
            except PushPullError as error:
                self._tell(peer, frame(encode(Failed(error))))
            else:
                if self._usual is not None and message.step == self._server.version:  # else it was a late repetition
                    self._usual.note(peer, message)
        elif isinstance(message, AttachArena):
            peer.arenas[message.arena] = Arena.attach(descriptors[0])
            peer.arenas[message.arena].close()
        elif isinstance(message, Watch):
            peer.watches = self._watched = True
            self._tell(peer, frame(encode(Written())))  # it may have looked just before one was
        elif isinstance(message, AskArenas):
            if self.own is not None:
                peer.channel.send(Arenas(), [self.versions.arena.descriptor, self.own.descriptor])
        elif isinstance(message, AskCommit):
            if (last := self._server.last) is not None:
                self._tell(peer, frame(encode(Committed(last, self._server.integers(last.version)))))
        elif isinstance(message, AskMissing):
            self._tell(peer, frame(encode(Missing(self._server.missing()))))

    def _drop(self, peer: Peer) -> None:
        # What it pushed stays: its arenas are mapped as long as somebody holds a tensor in them.
        self._peers.pop(peer.channel.fileno(), None)
        with contextlib.suppress(OSError, ValueError):
            self._epoll.unregister(peer.channel.fileno())
        peer.channel.close()

    def _advance(self) -> None:
        """Do whatever has become possible."""
        if self.failure is not None:
            return
        try:
            server = self._server
            self._before_update()
            if parts := server.ready_parts():
                self._look("aggregate")
                self._update(parts)
            if server.updated:
                self._commit()
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        self._tell_all(frame(encode(Failed(error))))
        self._on_change(None)

    def _update(self, parts: list[tuple[int, int]]) -> None:
        begin = time.perf_counter()
        slices, version = self._server.partition.slices, self._server.version + 1
        if self.on_written is None and not self._watched and self._on_stage is None:  # nobody is told in between
            rest = self._server.update_together(parts, self._team, self._scratches)
            done = {index for index, _ in parts} - {index for index, _ in rest}
            self.versions.mark((slices[index] for index in done), version)
            parts = rest
        left = iter(parts)  # next() on it is atomic: each part goes to one thread

        def work(thread: int) -> None:
            for index, part in left:
                if self._server.update_part(index, part, self._scratches[thread]):
                    self.versions.mark((slices[index],), version)
                if thread == 0 and self._on_stage is not None:
                    self._look("update")
                if thread == 0:
                    self._tell_written(version)

        if parts:
            self._team.run(work)
        self._look("update")  # others may have been quicker with all there was
        self._tell_written(version, bucket=True)
        self._wall += time.perf_counter() - begin

    _wall = 0.0

    def _tell_written(self, version: int, *, bucket: bool = False) -> None:
        """Wake those who wait for slices, once enough are new to be worth it, or all of a ``bucket``."""
        if (self.on_written is None and not self._watched) or version != self._server.version + 1:
            return
        if self.on_written is not None and (new := self._news_for_owner.take(version)):
            self.on_written(version, new)
        watching = [peer for peer in self._peers.values() if peer.watches]
        if watching and self._news_for_peers.take(version, 1 if bucket else None):
            written = frame(encode(Written()))
            for peer in watching:
                self._tell(peer, written)

    def _commit(self) -> None:
        server = self._server
        busy: dict[str, float] = {}
        for scratch in self._scratches:
            for stage, seconds in scratch.take_busy().items():
                busy[stage] = busy.get(stage, 0.0) + seconds
        # Several threads are busy at once: what a worker waits for is their time on the clock.
        share = self._wall / total if (total := sum(busy.values())) else 0.0
        shares = {stage: seconds * share for stage, seconds in busy.items()}
        commit = server.commit([shares], stop=self.stop, leave=self.leave, open_next=False)
        if self.before_word is not None:
            self.before_word(commit)
        self.versions.commit(server.index, server.version)
        self.last = commit
        if self._look("commit") != "drop-response":
            self._tell_all(frame(encode_committed(server.record)))
        # What follows is done while workers go on.
        self._on_change(commit)
        if self._usual is not None:
            self._usual.begin_step()
        self._begin_step()
        server.open_step()

    def _look(self, stage: str) -> object:
        """Tell whoever asked of the stage, once a step."""
        step = self._server.version + (stage != "commit")
        if self._on_stage is None or self._seen == (step, stage):
            return None
        self._seen = (step, stage)
        return self._on_stage(step, stage)

    def _begin_step(self) -> None:
        self._wall = 0.0
        self._news_for_peers.forget()
        self._news_for_owner.forget()

    def regroup(self, generation: int) -> None:
        """In the hub's thread: the membership has changed. All peers are turned out; who belongs to it comes again.

        Their arenas are forgotten with them: a member that was stopped may wake up and write.
        """
        for peer in list(self._peers.values()):
            self._drop(peer)
        if self._usual is not None:
            self._usual.forget()
        self._watched = False
        self.failure = None
        self.leave = False
        self._begin_step()
        # Nobody may take a slice for finished that is about to be written again.
        self.versions.mark(self._pieces, self._server.version)
        self._server.regroup(generation)

    def _tell_all(self, message: bytes) -> None:
        for peer in list(self._peers.values()):
            self._tell(peer, message)

    def _tell(self, peer: Peer, message: bytes) -> None:
        """Send what ``frame`` made."""
        try:
            peer.channel.post(message)
        except OSError:
            self._drop(peer)
        else:
            self._await_room(peer)

    def _await_room(self, peer: Peer) -> None:
        """Wait for room to send in as long as something is left to send: a peer that does not read stops nobody."""
        if peer.channel.pending != peer.stuck:
            peer.stuck = peer.channel.pending
            events = select.EPOLLIN | (select.EPOLLOUT if peer.stuck else 0)
            self._epoll.modify(peer.channel.fileno(), events)
