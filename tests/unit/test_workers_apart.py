"""A worker whose device has memory of its own: sums go down in buckets, versions come up while they are written.

A CPU stands in for the device: copies are made at once, and where a GPU's queue would wait, the worker does. Everything
else is real: the backend, its sending thread, the hub, its sockets and its passes without the interpreter.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from paramserver.client import Client
from paramserver.config import OptimizerConfig, ServerConfig
from paramserver.fingerprint import fingerprint
from paramserver.fused_sgd import fused_sgd
from paramserver.partition import Slice
from paramserver.server import Server
from paramserver.server_memory import ServerMemory
from paramserver.state import assemble
from paramserver.transport.hub import Hub
from paramserver.transport.shared_memory import SharedMemoryTransport
from paramserver.transport.versions import VersionsArena
from tests.support.servers import TIMEOUT_S
from tests.support.tiny_task import TinyTask
from tests.support.training import Run, train_single
from workers import launches, overlap, param_server
from workers.assembly import build_param_server_worker, build_parts
from workers.config import PlanConfig, WorkerConfig
from workers.host_memory import HostMemory
from workers.replica import Replica
from workers.report import StepReport

OPTIMIZER = OptimizerConfig(lr=0.1, momentum=0.9, weight_decay=1e-3)
SERVERS = ServerConfig(slice_bytes=512)


class Apart(HostMemory):
    """As ``PinnedMemory`` with queued versions."""

    copies = True
    queues = True

    def __init__(self, replica: Replica, client: Client, *, queues: bool = False) -> None:
        assert queues
        super().__init__(replica, client)
        self._halves = [torch.full_like(replica.values, torch.nan), replica.values]
        if client.version % 2 == 0:
            self._halves.reverse()
        self._twins: dict[int, Tensor] = {}
        self._thread = ThreadPoolExecutor(1)
        self._bringing: Future[None] | None = None
        self._expected = -1
        self.buckets: list[int] = []
        self.shown = 0

    def new_sum(self) -> Tensor:
        vector = torch.zeros_like(self._replica.values)
        self._twins[vector.data_ptr()] = self._client.allocate()
        return vector

    def on_host(self, vector: Tensor) -> Tensor:
        return self._twins[vector.data_ptr()]

    def send(self, vector: Tensor, slices: Sequence[Slice]) -> Callable[[], None]:
        for piece in slices:
            self.on_host(vector)[piece.start : piece.stop] = vector[piece.start : piece.stop]
        return lambda: None

    def expect(self, version: int, groups: Sequence[Sequence[Slice]]) -> None:
        self.buckets.append(len(groups))
        self._expected = version
        self._bringing = self._thread.submit(self._bring, version, groups)

    def _bring(self, version: int, groups: Sequence[Sequence[Slice]]) -> None:
        vector = self._client.vector(version)
        assert vector is not None
        for slices in groups:
            self._client.await_slices(version, slices)
            for piece in slices:
                self._halves[version % 2][piece.start : piece.stop] = vector[piece.start : piece.stop]

    def settle(self) -> None:
        if self._bringing is not None:
            self._bringing.result(TIMEOUT_S)

    def show(self, version: int) -> None:
        assert version == self._expected
        self.settle()
        self.shown += 1
        self._replica.point_to(self._halves[version % 2])

    def pull(self, version: int) -> Mapping[str, Tensor]:
        read = self._client.read(version)
        assert read is not None
        if version == self._expected:
            self.settle()
        else:
            self._halves[version % 2].copy_(read[0])
        self._replica.point_to(self._halves[version % 2])
        return read[1]

    def close(self) -> None:
        self._thread.shutdown()


@contextmanager
def _counting(hub: Hub) -> Iterator[list[bool]]:
    found: list[bool] = []
    usual: Any = hub._usual
    if usual is not None:
        run = usual.run
        usual.run = lambda: found.append(run()) or found[-1]
    yield found


def _run(monkeypatch: pytest.MonkeyPatch, plan: PlanConfig) -> tuple[Run, Run, Apart, int]:
    """What it became, what it should become, the device's memory, and how many steps were foretold."""
    config = WorkerConfig(plan=plan, overlap=True, early_forward=True, eval_every=7, step_timeout_s=TIMEOUT_S)
    single = train_single(TinyTask(), config, OPTIMIZER, SERVERS)
    made: list[Apart] = []

    def apart(replica: Replica, client: Client, *, queues: bool = False) -> Apart:
        made.append(Apart(replica, client, queues=queues))
        return made[-1]

    monkeypatch.setattr(param_server, "host_memory", apart)
    monkeypatch.setattr(overlap, "_LEAST_COPIED_ELEMENTS", 1)
    parts = build_parts(TinyTask(), config, OPTIMIZER, SERVERS)
    versions = VersionsArena.create(parts.partition)
    about = (OPTIMIZER, plan.microbatches, parts.state)
    memory = ServerMemory(parts.partition, 0, *about, versions.vectors)
    server = Server(0, parts.partition, *about, memory=memory)
    hub = Hub(server, versions, threads=2)
    with _counting(hub) as whole:
        transport = SharedMemoryTransport({0: hub.address}, parts.partition)
        worker, backend = build_param_server_worker(TinyTask(), config, parts.replica, transport)
        reports = list(worker.run())
        state = assemble(parts.partition, [hub.call(lambda: server.snapshot(plan.steps)).result(TIMEOUT_S)])
        backend.close()
        hub.close()
    steps = [report for report in reports if isinstance(report, StepReport)]
    return Run(state, steps, []), single, made[0], sum(whole)


@pytest.mark.parametrize("microbatches", [1, 2, 3])
def test_a_device_with_its_own_memory_has_the_bits_of_single(
    monkeypatch: pytest.MonkeyPatch, microbatches: int
) -> None:
    plan = PlanConfig(batch_size=12, microbatches=microbatches, steps=12, seed=3, drop_last=True)
    found, wanted, memory, foretold = _run(monkeypatch, plan)
    assert fingerprint(found.state.state_dict()) == wanted.fingerprint
    assert found.optimizer_fingerprint == wanted.optimizer_fingerprint
    assert [report.loss for report in found.steps] == [report.loss for report in wanted.steps]
    assert max(memory.buckets) > 2
    assert memory.shown == 12 - 2, (
        "each step's first pass is queued, but for the first and the one behind the evaluation"
    )
    if fused_sgd() is not None and plan.microbatches < 3:  # with three, a worker has two nodes
        assert foretold > 6


def test_a_pass_that_is_too_long_for_a_queue_waits_for_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "_MOST", 3)
    found, wanted, memory, _ = _run(monkeypatch, PlanConfig(batch_size=12, microbatches=1, steps=5, seed=3))
    assert fingerprint(found.state.state_dict()) == wanted.fingerprint
    assert memory.shown == 0
