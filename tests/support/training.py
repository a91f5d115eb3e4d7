"""Whole runs inside the test's process: ``single``, and any number of workers and servers without Ray."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from models.task import Task
from paramserver.config import OptimizerConfig, ServerConfig
from paramserver.fingerprint import fingerprint
from paramserver.messages import Commit
from paramserver.server import Server
from paramserver.state import State, assemble
from paramserver.transport.in_process import InProcessServers, InProcessTransport
from workers.assembly import build_param_server_worker, build_parts, build_single_worker
from workers.config import WorkerConfig
from workers.report import EvaluationReport, StepReport, merge_evaluations, merge_steps

torch.set_num_threads(1)


@dataclass(frozen=True)
class Run:
    """What is left of a run."""

    state: State
    steps: list[StepReport]
    evaluations: list[EvaluationReport]

    @property
    def fingerprint(self) -> str:
        """Of parameters and buffers."""
        return fingerprint(self.state.state_dict())

    @property
    def optimizer_fingerprint(self) -> str:
        """Of the optimizer's state."""
        return fingerprint(
            {f"{key}.{name}": value for key, held in self.state.optimizer.items() for name, value in held.items()}
        )

    @property
    def samples(self) -> list[list[tuple[int, list[int]]]]:
        """For each step the samples of each microbatch, whoever computed them."""
        return [[(row.microbatch, row.samples) for row in step.ledger] for step in self.steps]


def train_single(
    task: Task, config: WorkerConfig, optimizer: OptimizerConfig, servers: ServerConfig, resume: State | None = None
) -> Run:
    """A run of the backend ``single``."""
    worker, backend = build_single_worker(task, config, optimizer, servers, lambda: False, resume)
    reports = list(worker.run())
    return Run(
        backend.state(),
        [report for report in reports if isinstance(report, StepReport)],
        [report for report in reports if isinstance(report, EvaluationReport)],
    )


class _BatonTransport(InProcessTransport):
    """Gives the baton away while it waits: random generators are global, so one worker at a time may compute."""

    def __init__(self, servers: InProcessServers, baton: threading.Lock) -> None:
        super().__init__(servers)
        self._baton = baton

    def wait(self, server: int, version: int, timeout_s: float) -> Commit:
        """See ``Transport.wait``."""
        self._baton.release()
        try:
            return super().wait(server, version, timeout_s)
        finally:
            self._baton.acquire()


@contextmanager
def _failure_ends_all_waits(group: InProcessServers) -> Iterator[None]:
    """What the coordinator does, who stops everybody when one worker raised."""
    try:
        yield
    except BaseException as error:
        with group._changed:
            group._failure = group._failure or error
            group._changed.notify_all()
        raise


def train_workers(
    task: Task,
    config: WorkerConfig,
    optimizer: OptimizerConfig,
    servers: ServerConfig,
    resume: State | None = None,
    update_threads: int = 1,
) -> Run:
    """A parameter-server run of ``config.num_workers`` threads and ``servers.num_servers`` servers."""
    parts = build_parts(task, config, optimizer, servers)
    M, state = config.plan.microbatches, resume or parts.state
    held = [Server(i, parts.partition, optimizer, M, state) for i in range(servers.num_servers)]
    group = InProcessServers(held, update_threads)
    baton = threading.Lock()

    def work(index: int) -> list[StepReport | EvaluationReport]:
        with baton, _failure_ends_all_waits(group):
            own = replace(config, worker=index)
            transport = _BatonTransport(group, baton)
            worker, _ = build_param_server_worker(
                task, own, build_parts(task, own, optimizer, servers).replica, transport
            )
            return list(worker.run())

    with ThreadPoolExecutor(config.num_workers) as pool:
        # The last worker comes first: nothing may depend on the order of arrival.
        streams = list(pool.map(work, reversed(range(config.num_workers))))
    steps: dict[int, list[StepReport]] = {}
    evaluations: dict[int, list[EvaluationReport]] = {}
    for report in (report for stream in streams for report in stream):
        if isinstance(report, StepReport):
            steps.setdefault(report.step, []).append(report)
        else:
            evaluations.setdefault(report.step, []).append(report)
    assert all(len(reports) == config.num_workers for reports in (*steps.values(), *evaluations.values()))
    snapshots = [server.snapshot(server.version) for server in group.servers]
    return Run(
        assemble(parts.partition, snapshots),
        [merge_steps(reports) for _, reports in sorted(steps.items())],
        [merge_evaluations(reports) for _, reports in sorted(evaluations.items())],
    )
