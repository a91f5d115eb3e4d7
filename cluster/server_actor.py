"""The Ray actor of a server: a thin shell around the plain classes. Imported after Ray was started."""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import ray
import ray.exceptions
import torch

from cluster.place import Place, place_of_process, prepare_process
from cluster.published import Published
from cluster.ray_transport import POLL_S, WireArrival, WirePush, from_wire
from paramserver.arena import Arena
from paramserver.config import OptimizerConfig
from paramserver.errors import ServerLost, StaleContribution, StepTimeout
from paramserver.fused_adam import fused_adam
from paramserver.fused_sgd import fused_sgd
from paramserver.messages import Commit, Decision, Hello, Report
from paramserver.partition import Partition, Slice
from paramserver.server import Server
from paramserver.server_memory import ServerMemory
from paramserver.state import ServerSnapshot, State
from paramserver.transport.channel import Address
from paramserver.transport.exchange import prepare_exchange
from paramserver.transport.hub import Hub
from paramserver.transport.keeper import Keeper, claim
from paramserver.transport.versions import VersionsArena, share_versions
from paramserver.vote import decide
from workers.faults import NO_FAULTS, Faults, Observer

__all__ = ["ServerActor", "ServerStatus"]

T = TypeVar("T")

_VOTE_S = 60.0
_REPLICA_S = 60.0
_RECENT = 64
"""Commits that are remembered: more than a worker's reports can be late."""


class ServerStatus(NamedTuple):
    """What a server has."""

    version: int
    """The committed one."""
    last: Commit | None
    """Its commit; None if the run started from it."""
    recent: tuple[Commit, ...]
    """Commits of this process, as far as they are kept."""


class ServerActor:
    """An asynchronous actor around a ``Hub``: workers of this node reach it by its socket, all others by these calls.

    Args:
        partition, optimizer, num_microbatches, state, run: see ``Server``. One that stands by needs no values.
        threads: how many threads sum and update.
        arena_dir: where shared memory is made.
        faults: what is to happen.
        verify_every: see ``Server``.
    """

    def __init__(
        self,
        partition: Partition,
        optimizer: OptimizerConfig,
        num_microbatches: int,
        state: State,
        run: str,
        threads: int,
        arena_dir: str,
        faults: Faults = NO_FAULTS,
        verify_every: int = 0,
    ) -> None:
        prepare_process()
        self._verify_every = verify_every
        torch.set_num_threads(1)  # slices go to several threads, one operation does not
        # Now: one that stands by must not take long later.
        fused_sgd()
        prepare_exchange()
        if optimizer.name != "sgd":
            fused_adam()
        self._index = -1
        self._partition = partition
        self._about = (optimizer, num_microbatches, state)
        self._optimizer = optimizer
        self._run = run
        self._threads = threads
        self._arena_dir = Path(arena_dir)
        self._faults = faults
        self._observer: Observer | None = None
        self._held_versions: frozenset[int] = frozenset()
        self._generation = 0
        self._peers: list[Any] = []
        self._settled: dict[int, Decision] = {}
        self._reports: dict[int, Report] = {}
        self._decision: asyncio.Future[Decision] | None = None
        self._recent: deque[Commit] = deque(maxlen=_RECENT)
        self._keeper: Keeper | None = None
        self._replica: Any = None

    async def place(self) -> Place:
        """Where this server runs."""
        return place_of_process()

    async def keep(self, server: int, hub: Address) -> Address:
        """Stand by for a server of this node: keep its memory. Gives where ``open`` finds it."""
        if self._keeper is None:
            self._keeper = Keeper()
        await asyncio.to_thread(self._keeper.keep, server, hub)
        return self._keeper.address

    async def open(
        self,
        index: int,
        beside: Address | None,
        keeper: Address | None = None,
        replica: tuple[ServerSnapshot, Commit | None] | None = None,
    ) -> Address:
        """Begin to serve.

        Args:
            index: which server this is.
            beside: address of a server on this node whose arena is to be shared; None makes one.
            keeper: of the memory that a server of this number has left on this node, to go on from.
            replica: what another node has kept of a server of this number, to go on from.

        Returns:
            Where workers of this node connect.
        """
        self._loop = asyncio.get_running_loop()
        self._index = index
        partition, (optimizer, num_microbatches, state) = self._partition, self._about
        if keeper is not None:
            versions_arena, own = await asyncio.to_thread(claim, index, keeper)
            versions = VersionsArena(versions_arena, partition)
        else:
            versions = share_versions(beside, partition, self._arena_dir)
            own = Arena.create(ServerMemory.num_bytes(partition, index, *self._about), self._arena_dir)
        content = own.tensor(0, own.num_bytes, torch.uint8)
        memory = ServerMemory(partition, index, *self._about, versions.vectors, content)
        about = (optimizer, num_microbatches, state, self._run, memory)
        server = Server(index, partition, *about, verify_every=self._verify_every, replica=replica)
        # Copied: its memory in the object store is not needed any more.
        self._about = (optimizer, num_microbatches, replace(state, values={}, optimizer={}))
        self._server = server
        self._observer = self._faults.observer("server", index)
        self._published = Published(versions)
        self._hub = Hub(
            server,
            versions,
            threads=self._threads,
            before_update=lambda: server.vote(self._ask_vote),
            on_change=self._changed,
            own=own,
            on_stage=None if self._observer is None else self._observer.at,
        )
        return self._hub.address

    async def regroup(
        self,
        generation: int,
        peers: Sequence[Any],
        held_versions: Sequence[int],
        settled: Mapping[int, Decision],
        replica: Any = None,
    ) -> ServerStatus:
        """The membership has changed: whoever belongs to it comes again, and pushes the open step again.

        Args:
            generation: what it is called from now on.
            peers: handles of all servers.
            held_versions: those to keep until a snapshot of them was taken.
            settled: votes that were taken already, by step: some server may have acted on them.
            replica: handle of the ``ReplicaActor`` that is to have each version before anybody hears of it.
        """
        self._generation = generation
        self._peers = list(peers)
        self._settled = dict(settled)
        self._held_versions = frozenset(held_versions)
        # First of all: this server's own thread may be waiting for a vote of which nothing will come.
        if self._decision is not None and not self._decision.done():
            self._decision.set_exception(StaleContribution(f"the vote of server {self._index} is taken again"))
            self._decision.exception()  # it may be that nobody waits
        self._decision = None
        self._reports.clear()
        self._published.clear()

        def change() -> ServerStatus:
            self._hub.regroup(generation)
            if replica is not None and replica is not self._replica:
                self._replica, self._hub.before_word = replica, self._replicate
                self._replicate(self._server.last)
            for version in (self._server.version - 1, self._server.version):
                if version in self._held_versions and self._server.readable(version):
                    self._server.hold(version, once=True)
            return self._status()

        status = await self._in_hub(change)
        self._published.wake()
        return status

    def _replicate(self, commit: Commit | None) -> None:
        """In the hub's thread: the replica has the committed version before anybody hears of it."""
        if self._replica is None:
            return
        stored = self._replica.store.remote(self._index, self._server.snapshot(self._server.version), commit)
        try:
            ray.get(stored, timeout=_REPLICA_S)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            self._replica = None  # the coordinator sees it, too, and finds another

    async def status(self) -> ServerStatus:
        """What is committed here."""
        return await self._in_hub(self._status)

    def _status(self) -> ServerStatus:
        return ServerStatus(self._server.version, self._server.last, tuple(self._recent))

    async def noted(self, worker: int) -> int:
        """What a worker of this node has said of where it is."""
        return self._hub.versions.noted(worker)

    async def missing(self) -> list[int]:
        """See ``Server.missing``."""
        return await self._in_hub(self._server.missing)

    def _changed(self, commit: Commit | None) -> None:
        """In the hub's thread: a version was committed, or the run failed here."""
        if commit is not None:
            self._recent.append(commit)
        if commit is not None and commit.version in self._held_versions:
            self._server.hold(commit.version, once=True)
        if commit is not None and self._hub.on_written is not None:
            self._written(commit.version, self._partition.by_server[self._index])
        if commit is None or self._hub.on_written is not None:  # nobody has ever waited otherwise
            self._loop.call_soon_threadsafe(self._published.wake)

    def _written(self, version: int, pieces: Sequence[Slice]) -> None:
        """In the hub's thread: slices have a version that is not committed yet."""
        self._loop.call_soon_threadsafe(self._published.put, version, pieces)

    def _ask_vote(self, report: Report) -> Decision:
        """In the hub's thread: all servers' decision."""
        if report.step in self._settled:
            return self._settled[report.step]
        if len(self._peers) == 1:
            return decide([report], self._optimizer)
        try:
            decision: Decision = ray.get(self._peers[0].vote.remote(self._generation, report), timeout=_VOTE_S)
        except ray.exceptions.GetTimeoutError:
            raise StepTimeout(f"server {self._index} had no decision of the others within {_VOTE_S:.0f} s") from None
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayActorError:
            raise ServerLost("server 0 is gone: it could not take a vote", server=0) from None
        return decision

    async def vote(self, generation: int, report: Report) -> Decision:
        """Server 0 alone: collect all reports of a step, then give everybody the same decision."""
        self._check_generation(generation)
        if self._decision is None:
            self._decision = asyncio.get_running_loop().create_future()
        future = self._decision
        self._reports[report.server] = report
        if len(self._reports) == len(self._peers):
            future.set_result(decide(list(self._reports.values()), self._optimizer))
            self._reports.clear()
            self._decision = None
        return await future

    def _check_generation(self, generation: int) -> None:
        if generation != self._generation:
            raise StaleContribution(
                f"server {self._index} is in generation {self._generation} of the membership, not in {generation}"
            )

    async def _in_hub(self, function: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._hub.call(function))

    async def hello(self) -> Hello:
        """See ``Server.hello``."""
        return await self._in_hub(self._server.hello)

    async def push(self, push: WirePush) -> None:
        """See ``Server.push``."""
        await asyncio.wrap_future(self._hub.push(from_wire(push)))
        if self._observer is not None and self._observer.at(push.push.step + 1, "push") == "drop-response":
            await asyncio.Event().wait()

    async def publish(self, version: int, have: int = 0) -> WireArrival:
        """The whole ``version``, the committed one or the one before, but for the first ``have`` batches of it."""
        integers = await self._in_hub(lambda: self._server.integers(version))  # or it is gone
        self._published.put(version, self._partition.by_server[self._index])
        last = self._hub.last
        commit = last if last is not None and last.version == version else None
        return WireArrival(self._published.beyond(version, have), commit, integers)

    async def arrivals(self, generation: int, version: int, have: int, left_s: float, timeout_s: float) -> WireArrival:
        """What there is of ``version`` beyond the first ``have`` batches, as soon as there is more or it is committed.

        Args:
            generation: of the caller.
            version: the committed one, or the next.
            have: batches that the caller has.
            left_s: how long to wait.
            timeout_s: how long the caller has waited in all by then.
        """
        self._hub.on_written = self._written
        try:
            async with asyncio.timeout(min(left_s, POLL_S)):
                while self._hub.failure is None and (self._hub.last is None or self._hub.last.version < version):
                    self._check_generation(generation)
                    if batches := self._published.beyond(version, have):
                        return WireArrival(batches, None, {})
                    await self._published.changed()
        except TimeoutError:
            if left_s > POLL_S:
                return WireArrival([], None, {})
            missing = await self._in_hub(self._server.missing)
            raise StepTimeout(
                f"step {version}: server {self._index} waits for microbatches {missing} "
                f"since {timeout_s:.0f} s (--step-timeout)"
            ) from None
        if self._hub.failure is not None:
            raise self._hub.failure
        assert self._hub.last is not None
        return await self.publish(self._hub.last.version, have)

    async def request_stop(self) -> None:
        """Let the run end with the next version that is committed."""
        self._hub.stop = True

    async def request_leave(self) -> None:
        """Let the workers come back after the next version that is committed: the membership is to change."""
        self._hub.leave = True

    async def snapshot(self, version: int) -> ServerSnapshot:
        """See ``Server.snapshot``."""
        return await self._in_hub(lambda: self._server.snapshot(version))

    async def release(self, version: int) -> None:
        """Give a held version free."""
        self._held_versions -= {version}
        await self._in_hub(lambda: self._server.release(version))

    async def arena_bytes(self) -> tuple[int, int]:
        """Size of the arena with both versions, which servers of a node share, and of this server's own."""
        assert self._hub.own is not None
        return self._hub.versions.arena.num_bytes, self._hub.own.num_bytes

    async def close(self) -> None:
        """Stop serving."""
        self._hub.close()
