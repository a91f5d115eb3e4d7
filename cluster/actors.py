"""Ray actors: thin shells around the plain classes. Imported after Ray was started."""

import asyncio
import os
import platform
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import ray
import torch

from cluster.ray_transport import RayTransport, WirePush, from_wire
from models.options import TaskOptions
from models.registry import TaskSource, build_task
from paramserver.config import OptimizerConfig, ServerConfig
from paramserver.errors import StepTimeout
from paramserver.messages import Commit, Decision, Hello, Report
from paramserver.partition import Partition
from paramserver.server import Server
from paramserver.state import ServerSnapshot, State
from paramserver.vote import decide
from workers.assembly import build_param_server_worker, build_parts
from workers.config import WorkerConfig
from workers.device import device_kind
from workers.install import check_install
from workers.report import EvaluationReport, StepReport

__all__ = ["Place", "ServerActor", "WorkerActor"]


class Place(NamedTuple):
    """Where an actor's process runs."""

    pid: int
    node: str
    host: str
    device_kind: dict[str, Any] | None = None


def _place(kind: dict[str, Any] | None = None) -> Place:
    return Place(os.getpid(), ray.get_runtime_context().get_node_id(), platform.node(), kind)


def _gpu_index(config: WorkerConfig) -> int:
    """Which GPU this actor computes on: the one Ray gave it, or in turn where they are shared."""
    count = torch.cuda.device_count() if config.device == "cuda" else 0
    if count < 2:  # a cluster that masks GPUs shows the actor its own one alone
        return 0
    given = ray.get_gpu_ids()
    return int(given[0]) if given else config.worker % count


def _prepare_process() -> None:
    check_install()
    # Arrays out of Ray's store are read-only; we never write them.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


class ServerActor:
    """An asynchronous actor around ``Server``: a ``wait`` in progress must not keep out the push that ends it."""

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
    ) -> None:
        _prepare_process()
        torch.set_num_threads(threads)
        self._server = Server(index, partition, optimizer, num_microbatches, state, run)
        self._held_versions = frozenset(held_versions)
        self._peers: list[Any] = []
        self._changed = asyncio.Condition()
        self._commit: Commit | None = None
        self._published: tuple[int, Any] = (-1, None)
        self._failure: Exception | None = None
        self._advancing = False
        self._stop = False
        self._reports: dict[int, Report] = {}
        self._decision: asyncio.Future[Decision] | None = None

    async def meet(self, servers: Sequence[Any]) -> Place:
        """Learn the handles of all servers; says where this one runs."""
        self._peers = list(servers)
        return _place()

    async def hello(self) -> Hello:
        """See ``Server.hello``."""
        return self._server.hello()

    async def push(self, push: WirePush) -> None:
        """See ``Server.push``."""
        self._server.push(from_wire(push))
        await self._advance()

    async def _advance(self) -> None:
        """Update and commit once everything has arrived; one at a time, since a vote is waited for in between."""
        if self._advancing or not self._server.ready:
            return
        self._advancing = True
        try:
            decision = None
            if self._server.config.needs_vote:
                decision = await self._peers[0].vote.remote(self._server.report())
            self._server.update(decision)
            begin = time.perf_counter()
            commit = self._server.commit()
            if self._server.version in self._held_versions:
                self._server.hold(self._server.version)
            self._publish()
            busy = {**commit.server_ms, "commit": 1e3 * (time.perf_counter() - begin)}
            # Fixed here, so that all workers read the same answer.
            self._commit = replace(commit, server_ms=busy, stop=self._stop)
        except Exception as error:
            self._failure = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
        finally:
            self._advancing = False
        async with self._changed:
            self._changed.notify_all()

    async def vote(self, report: Report) -> Decision:
        """Server 0 alone: collect all reports of a step, then give everybody the same decision."""
        if self._decision is None:
            self._decision = asyncio.get_running_loop().create_future()
        future = self._decision
        self._reports[report.server] = report
        if len(self._reports) == len(self._peers):
            future.set_result(decide(list(self._reports.values()), self._server.config))
            self._reports.clear()
            self._decision = None
        return await future

    def _publish(self) -> None:
        version = self._server.version
        integers = {name: value.numpy() for name, value in self._server.integers(version).items()}
        self._published = (version, ray.put((self._server.flat(version).numpy(), integers)))

    async def publish(self, version: int) -> list[Any]:
        """A list with the reference of (flat vector, integer buffers) at ``version``."""
        self._server.values(version)  # raises if it is gone
        if self._published[0] != version:
            self._publish()
        return [self._published[1]]

    async def wait(self, version: int, timeout_s: float) -> tuple[Commit, list[Any]]:
        """The commit of ``version`` and the reference of its values, as soon as there is one."""

        def arrived() -> bool:
            return self._failure is not None or self._server.version >= version

        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(arrived)
        except TimeoutError:
            raise StepTimeout(
                f"step {version}: server {self._server.index} waits for microbatches {self._server.missing()} "
                f"since {timeout_s:.0f} s (--step-timeout)"
            ) from None
        if self._failure is not None:
            raise self._failure
        assert self._commit is not None
        return self._commit, [self._published[1]]

    async def request_stop(self) -> None:
        """Let the run end with the next version that is committed."""
        self._stop = True

    async def snapshot(self, version: int, *, release: bool) -> ServerSnapshot:
        """See ``Server.snapshot``; gives the held version free where asked."""
        snapshot = self._server.snapshot(version)
        if release:
            self._server.release(version)
            await self._advance()
        return snapshot


class WorkerActor:
    """A process that trains: built in two steps, since its servers are started from the same model."""

    def __init__(
        self,
        source: TaskSource,
        options: TaskOptions,
        config: WorkerConfig,
        optimizer: OptimizerConfig,
        servers: ServerConfig,
    ) -> None:
        _prepare_process()
        self._task = build_task(source, options)
        self._config = replace(config, device_index=_gpu_index(config))
        self._parts = build_parts(self._task, self._config, optimizer, servers)

    def place(self) -> Place:
        """Where this worker runs, and what kind of device it is."""
        return _place(device_kind(self._config))

    def run(self, servers: Sequence[Any]) -> Iterator[StepReport | EvaluationReport]:
        """Train to the end; a streaming generator, so that the worker never waits for who reads it."""
        transport = RayTransport(servers, self._parts.partition)
        worker, backend = build_param_server_worker(self._task, self._config, self._parts, transport)
        try:
            yield from worker.run()
        finally:
            backend.close()
