"""Ray actors: thin shells around the plain classes. Imported after Ray was started."""

import asyncio
import os
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import ray
import torch

from cluster.ray_transport import WireArrival, WirePush, from_wire
from cluster.rounding import Rounding
from cluster.route import route
from models.options import TaskOptions
from models.registry import TaskSource, build_task
from paramserver.config import OptimizerConfig, ServerConfig
from paramserver.error_feedback import ErrorFeedback
from paramserver.errors import StepTimeout
from paramserver.messages import Commit, Decision, Hello, Report
from paramserver.partition import Partition, Slice
from paramserver.server import Server
from paramserver.state import ServerSnapshot, State
from paramserver.transport.channel import Address
from paramserver.transport.hub import Hub
from paramserver.transport.versions import share_versions
from paramserver.vote import decide
from workers.assembly import build_param_server_worker, build_parts
from workers.config import WorkerConfig
from workers.device import device_kind
from workers.install import check_install
from workers.report import EvaluationReport, StepReport

__all__ = ["Place", "ServerActor", "WorkerActor", "place_of_process", "prepare_process"]

T = TypeVar("T")

_VOTE_S = 60.0


class Place(NamedTuple):
    """Where an actor's process runs."""

    pid: int
    node: str
    host: str
    device_kind: dict[str, Any] | None = None


def place_of_process(kind: dict[str, Any] | None = None) -> Place:
    """Where the calling actor runs."""
    return Place(os.getpid(), ray.get_runtime_context().get_node_id(), platform.node(), kind)


def _gpu_index(config: WorkerConfig) -> int:
    """Which GPU this actor computes on: the one Ray gave it, or in turn where they are shared."""
    count = torch.cuda.device_count() if config.device == "cuda" else 0
    if count < 2:  # a cluster that masks GPUs shows the actor its own one alone
        return 0
    given = ray.get_gpu_ids()
    return int(given[0]) if given else config.worker % count


def prepare_process() -> None:
    """What every actor does first."""
    check_install()
    # Arrays out of Ray's store are read-only; we never write them.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


class ServerActor:
    """An asynchronous actor around a ``Hub``: workers of this node reach it by its socket, all others by these calls.

    Args:
        index, partition, optimizer, num_microbatches, state, run: see ``Server``.
        threads: how many threads sum and update.
        held_versions: versions that are held until a snapshot of them was taken.
        arena_dir: where shared memory is made.
    """

    def __init__(
        self,
        index: int,
        partition: Partition,
        optimizer: OptimizerConfig,
        num_microbatches: int,
        state: State,
        run: str,
        threads: int,
        held_versions: Sequence[int],
        arena_dir: str,
    ) -> None:
        prepare_process()
        torch.set_num_threads(1)  # slices go to several threads, one operation does not
        self._index = index
        self._partition = partition
        self._optimizer = optimizer
        self._num_microbatches = num_microbatches
        self._state: State | None = state
        self._run = run
        self._threads = threads
        self._held_versions = frozenset(held_versions)
        self._arena_dir = Path(arena_dir)
        self._peers: list[Any] = []
        self._waiting: list[asyncio.Future[None]] = []
        self._published: tuple[int, list[tuple[tuple[int, ...], list[Any]]]] = (-1, [])
        self._reports: dict[int, Report] = {}
        self._decision: asyncio.Future[Decision] | None = None

    async def place(self) -> Place:
        """Where this server runs."""
        return place_of_process()

    async def open(self, peers: Sequence[Any], beside: Address | None) -> Address:
        """Begin to serve.

        Args:
            peers: handles of all servers.
            beside: address of a server on this node whose arena is to be shared; None makes one.

        Returns:
            Where workers of this node connect.
        """
        self._peers = list(peers)
        self._loop = asyncio.get_running_loop()
        versions = share_versions(beside, self._partition, self._arena_dir)
        assert self._state is not None
        server = Server(
            self._index,
            self._partition,
            self._optimizer,
            self._num_microbatches,
            self._state,
            self._run,
            versions.vectors,
        )
        self._state = None  # copied: its memory in the object store is not needed any more
        self._server = server
        ask = self._ask_vote if len(self._peers) > 1 else self._decide_alone
        self._hub = Hub(
            server,
            versions,
            threads=self._threads,
            before_update=lambda: server.vote(ask),
            on_change=self._changed,
        )
        return self._hub.address

    def _changed(self, commit: Commit | None) -> None:
        """In the hub's thread: a version was committed, or the run failed here."""
        if commit is not None and commit.version in self._held_versions:
            self._server.hold(commit.version)
        if commit is not None and self._hub.on_written is not None:
            self._written(commit.version, self._partition.by_server[self._index])
        self._loop.call_soon_threadsafe(self._wake)

    def _written(self, version: int, pieces: Sequence[Slice]) -> None:
        """In the hub's thread: slices have a version that is not committed yet."""
        self._loop.call_soon_threadsafe(self._publish, version, pieces)

    def _publish(self, version: int, pieces: Sequence[Slice]) -> None:
        """Put slices into Ray's object store, for whoever waits for ``arrivals``."""
        if self._published[0] != version:
            self._published = (version, [])
        known = {index for indices, _ in self._published[1] for index in indices}
        new = [piece for piece in pieces if piece.index not in known]
        if new:
            vector = self._hub.versions.vectors[version % 2]
            arrays = [vector[piece.start : piece.stop].numpy() for piece in new]
            self._published[1].append((tuple(piece.index for piece in new), [ray.put(arrays)]))
        self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def _decide_alone(self, report: Report) -> Decision:
        return decide([report], self._optimizer)

    def _ask_vote(self, report: Report) -> Decision:
        try:
            decision: Decision = ray.get(self._peers[0].vote.remote(report), timeout=_VOTE_S)
        except ray.exceptions.GetTimeoutError:
            raise StepTimeout(f"server {self._index} had no decision of the others within {_VOTE_S:.0f} s") from None
        return decision

    async def vote(self, report: Report) -> Decision:
        """Server 0 alone: collect all reports of a step, then give everybody the same decision."""
        if self._decision is None:
            self._decision = asyncio.get_running_loop().create_future()
        future = self._decision
        self._reports[report.server] = report
        if len(self._reports) == len(self._peers):
            future.set_result(decide(list(self._reports.values()), self._optimizer))
            self._reports.clear()
            self._decision = None
        return await future

    async def _in_hub(self, function: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._hub.call(function))

    async def hello(self) -> Hello:
        """See ``Server.hello``."""
        return await self._in_hub(self._server.hello)

    async def push(self, push: WirePush) -> None:
        """See ``Server.push``."""
        await asyncio.wrap_future(self._hub.push(from_wire(push)))

    async def publish(self, version: int, have: int = 0) -> WireArrival:
        """The whole committed ``version`` but for the first ``have`` batches of it."""
        integers = await self._in_hub(lambda: self._server.integers(version))  # or it is gone
        self._publish(version, self._partition.by_server[self._index])
        return WireArrival(self._published[1][have:], self._hub.last, integers)

    async def arrivals(self, version: int, have: int, left_s: float, timeout_s: float) -> WireArrival:
        """What there is of ``version`` beyond the first ``have`` batches, as soon as there is more or it is committed.

        Args:
            version: the committed one, or the next.
            have: batches that the caller has.
            left_s: how long to wait.
            timeout_s: how long the caller has waited in all by then.
        """
        self._hub.on_written = self._written
        try:
            async with asyncio.timeout(left_s):
                while self._hub.failure is None and (self._hub.last is None or self._hub.last.version < version):
                    if self._published[0] == version and len(self._published[1]) > have:
                        return WireArrival(self._published[1][have:], None, {})
                    self._waiting.append(asyncio.get_running_loop().create_future())
                    await self._waiting[-1]
        except TimeoutError:
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

    async def snapshot(self, version: int, *, release: bool) -> ServerSnapshot:
        """See ``Server.snapshot``; gives the held version free where asked."""

        def take() -> ServerSnapshot:
            snapshot = self._server.snapshot(version)
            if release:
                self._server.release(version)
            return snapshot

        return await self._in_hub(take)

    async def last_commit(self) -> Commit | None:
        """The commit of the current version, once one was made."""
        return self._hub.last

    async def arena_bytes(self) -> int:
        """Size of the arena with both versions, which servers of a node share."""
        return self._hub.versions.arena.num_bytes

    async def close(self) -> None:
        """Stop serving."""
        self._hub.close()


class WorkerActor:
    """A process that trains: built in two steps, since its servers are started from the same model."""

    def __init__(
        self,
        source: TaskSource,
        options: TaskOptions,
        config: WorkerConfig,
        optimizer: OptimizerConfig,
        servers: ServerConfig,
        arena_dir: str,
    ) -> None:
        prepare_process()
        self._arena_dir = Path(arena_dir)
        self._task = build_task(source, options)
        self._config = replace(config, device_index=_gpu_index(config))
        # Not the initial state, which the servers have: it is as large as the model.
        self._replica = build_parts(self._task, self._config, optimizer, servers).replica

    def place(self) -> Place:
        """Where this worker runs, and what kind of device it is."""
        return place_of_process(device_kind(self._config))

    def run(
        self, index: int, servers: Sequence[Any], addresses: Mapping[int, Address], rounding: Rounding | None = None
    ) -> Iterator[StepReport | EvaluationReport]:
        """Train to the end; a streaming generator, so that the worker never waits for who reads it.

        Args:
            index: this worker's number, which is dealt once all have their places.
            servers: handles of all servers.
            addresses: where each is reached by shared memory, itself or a relay; empty if Ray is to carry everything.
            rounding: how contributions are rounded that Ray carries, if they are.
        """
        config, partition = replace(self._config, worker=index), self._replica.partition
        feedback = ErrorFeedback(rounding.precision, partition, rounding.residuals) if rounding else None
        transport = route(servers, addresses, partition, self._arena_dir, feedback, config.step_timeout_s)
        worker, backend = build_param_server_worker(self._task, config, self._replica, transport)
        held = frozenset(rounding.held_versions if rounding else ())
        try:
            for report in worker.run():
                # This actor answers no calls before its last step: a checkpoint's residuals come with the report.
                if feedback and isinstance(report, StepReport) and (report.stop or report.step in held):
                    yield replace(report, residuals=feedback.residuals(report.step))
                else:
                    yield report
        finally:
            backend.close()
