"""The Ray actor of a worker: a thin shell around the plain classes. Imported after Ray was started."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import torch

from cluster.config import Seat
from cluster.place import Place, place_of_process, prepare_process
from cluster.rounding import Rounding
from cluster.route import route
from models.options import TaskOptions
from models.registry import TaskSource, build_task
from paramserver.config import OptimizerConfig, ServerConfig
from paramserver.error_feedback import ErrorFeedback
from paramserver.transport.channel import Address
from workers.assembly import build_param_server_worker, build_parts
from workers.config import WorkerConfig
from workers.device import device_kind
from workers.faults import NO_FAULTS, Faults
from workers.report import EvaluationReport, StepReport
from workers.samples import MicrobatchLoader, build_loader

__all__ = ["WorkerActor"]


def _gpu_index(config: WorkerConfig) -> int:
    """Which GPU this actor computes on: the one Ray gave it, or in turn where they are shared."""
    count = torch.cuda.device_count() if config.device == "cuda" else 0
    if count < 2:  # a cluster that masks GPUs shows the actor its own one alone
        return 0
    given = ray.get_gpu_ids()
    return int(given[0]) if given else config.worker % count


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
        faults: Faults = NO_FAULTS,
    ) -> None:
        prepare_process()
        self._faults = faults
        self._arena_dir = Path(arena_dir)
        self._task = build_task(source, options)
        self._config = replace(config, device_index=_gpu_index(config))
        # Not the initial state, which the servers have: it is as large as the model.
        self._replica = build_parts(self._task, self._config, optimizer, servers).replica
        self._loader: MicrobatchLoader | None = None

    def place(self) -> Place:
        """Where this worker runs, and what kind of device it is."""
        return place_of_process(device_kind(self._config))

    def run(
        self,
        seat: Seat,
        servers: Sequence[Any],
        addresses: Mapping[int, Address],
        rounding: Rounding | None = None,
        *,
        evaluate: bool = False,
        train: bool = True,
    ) -> Iterator[StepReport | EvaluationReport]:
        """Train until the run ends or the membership changes; may be called again then.

        A streaming generator, so that the worker never waits for who reads it.

        Args:
            seat: this worker's place among those that compute.
            servers: handles of all servers.
            addresses: where each is reached by shared memory, itself or a relay; empty if Ray is to carry everything.
            rounding: how contributions are rounded that Ray carries, if they are.
            evaluate: see ``Worker.run``.
            train: see ``Worker.run``.
        """
        config = replace(self._config, worker=seat.position, num_workers=seat.of, number=seat.number)
        partition = self._replica.partition
        if self._loader is None:
            self._loader = build_loader(self._task, config)
        feedback = ErrorFeedback(rounding.precision, partition, rounding.residuals) if rounding else None
        transport = route(servers, addresses, partition, self._arena_dir, feedback, config.step_timeout_s)
        try:
            faults = self._faults.observer("worker", seat.number)
            worker, backend = build_param_server_worker(
                self._task, config, self._replica, transport, self._loader, faults, seat.generation
            )
        except BaseException:
            transport.close()
            raise
        held = frozenset(rounding.held_versions if rounding else ())
        try:
            for report in worker.run(evaluate=evaluate, train=train):
                # This actor answers no calls before its last step: a checkpoint's residuals come with the report.
                if feedback and isinstance(report, StepReport) and (report.stop or report.step in held):
                    yield replace(report, residuals=feedback.residuals(report.step))
                else:
                    yield report
        finally:
            backend.close()
