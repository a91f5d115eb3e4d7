"""Whether a hub's next round is one of the usual kind, and the bookkeeping around it; see ``exchange``."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from paramserver.fused import PassUnavailable
from paramserver.messages import Commit, Push
from paramserver.partition import Slice
from paramserver.transport.channel import HEADER_BYTES
from paramserver.transport.exchange import Exchange, Foretold, Words
from paramserver.transport.peer import Peer
from paramserver.transport.served import Served
from paramserver.transport.versions import VersionsArena
from paramserver.transport.wire import Heard, decode

__all__ = ["UsualRounds", "usual_rounds"]


class _Contribution(NamedTuple):
    """A push, and who has sent it."""

    peer: Peer
    heard: Heard


class UsualRounds:
    """Foretells each step from the one before; for the hub's thread alone, but for ``say``.

    Args:
        server: what the hub serves.
        pieces: its slices.
        versions: the arena that workers map.
        epoll: descriptor of what the hub waits with.
        threads: how many work on a pass.

    Raises:
        PassUnavailable: if there is no compiler.
    """

    def __init__(
        self, server: Served, pieces: Sequence[Slice], versions: VersionsArena, epoll: int, threads: int
    ) -> None:
        self._server = server
        self._pieces = pieces
        words, committed = versions.addresses(pieces, server.index)
        by_slice = {piece.index: word for piece, word in zip(pieces, words, strict=True)}
        self._exchange = Exchange(epoll, threads, Words(by_slice, committed))
        self._last: list[_Contribution] = []
        """The pushes of the step that was committed last, of each peer in the order in which it sent them."""
        self._open: list[_Contribution] = []
        """Those of the open step that Python has taken."""
        self._buckets: list[Sequence[int]] = []
        """Slices of the step that is foretold, in the order in which they come."""
        self._peers: list[Peer] = []
        """Its contributors, in the order in which the exchange has them."""

    def say(self, *, stop: bool, leave: bool) -> None:
        """What the next commit says."""
        self._exchange.say(stop=stop, leave=leave)

    def note(self, peer: Peer, heard: Heard) -> None:
        """A push was taken another way."""
        self._open.append(_Contribution(peer, heard))

    def begin_step(self) -> None:
        """The open step was committed another way."""
        self._last, self._open = self._open, []

    def forget(self) -> None:
        """Nothing is to be concluded from what was pushed so far."""
        self._last, self._open = [], []

    def arm(self, peers: Mapping[int, Peer]) -> bool:
        """Be ready for the open step, if it can be foretold: ``run`` may follow."""
        last, step = self._last, self._server.version
        if not last or self._open:
            return False
        watchers = [peer.channel for peer in peers.values() if peer.watches]
        by_peer = _by_peer(last)
        if watchers and len(by_peer[0]) == 1:  # they want to be told in the middle of it
            return False
        if not all(_may_repeat(peers, c, step) for c in last) or not all(channel.idle for channel in watchers):
            self._last = []
            return False
        again = [[c.peer.find(c.heard._replace(lasting=None, step=step), self._pieces) for c in own] for own in by_peer]
        plan = self._server.plan(list(zip(*again, strict=True))) if _alike(again) else None
        if plan is None:
            self._last = []  # asked once a step
            return False
        self._buckets = [bucket.slices for bucket in plan.buckets]
        self._peers = [own[0].peer for own in by_peer]
        foretold = [
            [
                Foretold(c.peer.channel.fileno(), push.worker, c.heard.slot, step, push.node, len(c.heard.integers))
                for c, push in zip(own, pushes, strict=True)
            ]
            for own, pushes in zip(by_peer, again, strict=True)
        ]
        self._exchange.arm(plan, foretold, [channel.fileno() for channel in watchers])
        return True

    def run(self) -> bool:
        """Carry the step out, and tell all who have pushed; False if something else has happened."""
        return self._exchange.run()

    def take_back(self) -> list[tuple[Peer, Heard]]:
        """What has come before ``run`` gave up; ``note`` follows for each that is taken."""
        done = self._buckets[: self._exchange.done]
        self._server.interrupt(index for bucket in done for index in bucket)
        return self._came()

    @property
    def spent_s(self) -> float:
        """Seconds on the clock that updates took before ``run`` gave up."""
        return self._exchange.spent_s

    def conclude(self) -> Commit:
        """After a round that was done: let the server know what has happened to it."""
        self._last = [_Contribution(*came) for came in self._came()]
        pushes = [peer.find(heard, self._pieces) for peer, heard in self._last]
        return self._server.conclude(pushes, self._exchange.record)

    def _came(self) -> list[tuple[Peer, Heard]]:
        found: list[tuple[Peer, Heard]] = []
        for index, peer in enumerate(self._peers):
            for taken in self._exchange.taken(index):
                heard = decode(taken[HEADER_BYTES:])
                assert isinstance(heard, Heard)
                found.append((peer, heard))
        return found

    @property
    def answer(self) -> bytes:
        """The frame by which contributors were told."""
        return self._exchange.answer

    def sent(self) -> dict[int, int]:
        """How much of it was sent, by descriptor of the socket; -1: who is there is gone."""
        return {peer.channel.fileno(): self._exchange.sent(index) for index, peer in enumerate(self._peers)}

    def close(self) -> None:
        """End the threads."""
        self._exchange.close()


def _may_repeat(peers: Mapping[int, Peer], contribution: _Contribution, step: int) -> bool:
    peer, heard = contribution
    connected = peers.get(peer.channel.fileno()) is peer
    return connected and peer.channel.idle and heard.slot >= 0 and heard.step == step - 1


def _by_peer(contributions: Sequence[_Contribution]) -> list[list[_Contribution]]:
    found: dict[int, list[_Contribution]] = {}
    for contribution in contributions:
        found.setdefault(id(contribution.peer), []).append(contribution)
    return list(found.values())


def _alike(pushes: Sequence[Sequence[Push]]) -> bool:
    """Whether each contributor, of one node, cuts a step into the same buckets."""
    buckets = [push.slices.keys() for push in pushes[0]]
    return all(
        [push.slices.keys() for push in own] == buckets and all(push.node == own[0].node for push in own)
        for own in pushes
    )


def usual_rounds(
    server: Served, pieces: Sequence[Slice], versions: VersionsArena, epoll: int, threads: int
) -> UsualRounds | None:
    """The same, or None where there is no compiler."""
    try:
        return UsualRounds(server, pieces, versions, epoll, threads)
    except PassUnavailable:
        return None
