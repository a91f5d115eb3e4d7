"""The training loop, one for all backends."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

from models.task import Batch, LossSum, Task
from paramserver.errors import ConfigError
from workers.backend import Backend
from workers.config import WorkerConfig
from workers.counted import Counted
from workers.device import keep_freed_memory
from workers.evaluation import evaluate
from workers.faults import Observer
from workers.minibatch import deal_runs
from workers.precision import autocast, backward_scaled
from workers.profiling import StepProfiler, stage_in_trace
from workers.replica import Replica
from workers.report import EvaluationReport, LedgerRow, StepReport
from workers.samples import MicrobatchLoader, build_loader
from workers.seeding import seeded
from workers.timing import PhaseTimer

__all__ = ["Worker"]


class _Begun(NamedTuple):
    """A microbatch whose forward pass is done."""

    batch: Batch
    loss: LossSum


class Worker:
    """Computes its run of microbatches of every step.

    Args:
        task: what is learned.
        config: this worker's place and settings.
        replica: its model.
        backend: how gradients become the next version.
        loader: of the training set; None makes one.
        faults: what is to happen here, if anything is.
    """

    def __init__(
        self,
        task: Task,
        config: WorkerConfig,
        replica: Replica,
        backend: Backend,
        loader: MicrobatchLoader | None = None,
        faults: Observer | None = None,
    ) -> None:
        self._task = task
        self._config = config
        self._replica = replica
        self._backend = backend
        self._loader = build_loader(task, config) if loader is None else loader
        self.plan = self._loader.plan
        self._run = deal_runs(config.plan.microbatches, config.num_workers)[config.worker]
        self._faults = faults
        self._at = backend.version + 1
        self._poisoned = False
        self._timer = PhaseTimer(self._enter, around=stage_in_trace if config.profile else None)
        self._profiler = StepProfiler(config.profile, config.called, replica.device) if config.profile else None
        self._begun: _Begun | None = None
        self._ended = 0.0
        self._stepped = False
        self._loader.begin(self._run, backend.version)

    def run(self, *, evaluate: bool = False, train: bool = True) -> Iterator[StepReport | EvaluationReport]:
        """Take step after step; between two reports the caller may read the version just committed.

        Args:
            evaluate: whether to begin with an evaluation, which whoever computed the committed version did not finish.
            train: whether steps follow.
        """
        config = self._config
        if evaluate:
            yield from self._evaluation(self._backend.version)
        while train and self._backend.version < config.plan.steps:
            report = self._profiled_step(self._backend.version)
            yield report
            if report.stop:
                self._begun = None  # a pass that nobody will go on with
            due = config.eval_every and report.step % config.eval_every == 0
            if config.evaluate and (due or report.stop):
                yield from self._evaluation(report.step)
            if report.stop or report.commit.leave:
                return

    def close(self) -> None:
        """End what draws its samples, and what was recorded of steps that did not come to their end."""
        self._loader.close()
        if self._profiler is not None:
            self._profiler.give_up()

    def _enter(self, stage: str) -> None:
        self._backend.note(self._at, stage)
        if self._faults is not None and self._faults.at(self._at, stage) == "nan":
            self._poisoned = True

    def _profiled_step(self, step: int) -> StepReport:
        if self._profiler is None:
            return self._step(step)
        self._profiler.begin(step + 1)
        report = self._step(step)
        self._profiler.end(report.step, stop=report.stop or report.commit.leave)
        return report

    def _step(self, step: int) -> StepReport:
        self._at = step + 1
        # A GPU that has this step in its queue went on with it, whatever was done here since the commit.
        queued = self._begun is not None and self._replica.device.type == "cuda"
        begin = time.perf_counter()
        if queued:
            self._timer.book(begin - self._ended, "compute")
            begin = self._ended
        self._backend.pull(self._timer)
        microbatches = self.plan.microbatches(step)
        filled = [index for index in self._run if microbatches[index]]
        for index in self._run:
            last = index in filled[-1:]
            counted = self._microbatch(step, index, last=last) if microbatches[index] else Counted(index)
            self._backend.contribute(counted, self._timer)
        self._backend.push(self._timer)
        with self._timer.phase("split"):
            self._loader.prepare()  # while others compute and the servers update
        if not self._stepped:  # nothing of a step is held here
            self._stepped = True
            keep_freed_memory(self._replica.device)
        self._begin_early(step + 1)
        commit = self._backend.wait(self._timer)
        self._ended = time.perf_counter()
        step_ms = 1e3 * (self._ended - begin)
        ledger = tuple(LedgerRow(index, self._config.called, microbatches[index]) for index in self._run)
        return StepReport(
            step=commit.version,
            epoch=self.plan.epoch(step),
            worker=self._config.called,
            commit=commit,
            ledger=ledger,
            step_ms=step_ms,
            phases_ms=self._backend.mean_phases(self._timer.take_ms()),
            stop=commit.stop or commit.version == self._config.plan.steps,
        )

    def _begin_early(self, step: int) -> None:
        """The first forward pass of ``step``, if it may begin before the commit that comes next."""
        config = self._config
        pauses = config.evaluate and config.eval_every and step % config.eval_every == 0
        if step == config.plan.steps or pauses or not self.plan.microbatches(step)[self._run.start]:
            return
        early = self._backend.ahead()
        if early is not None:
            batch = self._next_batch()
            with self._timer.phase("compute"), early:
                self._begun = _Begun(batch, self._forward(step, self._run.start, batch))
            with self._timer.phase("split"):
                self._loader.prepare()

    def _microbatch(self, step: int, index: int, *, last: bool) -> Counted:
        begun, self._begun = self._begun, None
        batch = self._next_batch() if begun is None else begun.batch
        with self._timer.phase("compute"), self._backend.microbatch(index, last=last):
            loss = self._forward(step, index, batch) if begun is None else begun.loss
            counted = Counted(index, loss, len(batch))
            self._backend.forwarded(counted)
            spoilt, self._poisoned = self._poisoned, False
            wanted = loss._replace(total=loss.total * float("nan")) if spoilt else loss
            self._backward(wanted, lambda: self._seeded("backward", step, index))
        return counted

    def _forward(self, step: int, index: int, batch: Batch) -> LossSum:
        with self._seeded("microbatch", step, index):
            return self._loss(batch)

    def _backward(self, loss: LossSum, seeded: Callable[[], AbstractContextManager[None]]) -> None:
        if self._config.precision == "fp16":
            backward_scaled(loss, [parameter for _, parameter in self._replica.parameters], seeded)
            return
        with seeded():
            loss.total.backward()  # type: ignore[no-untyped-call]

    def _seeded(self, what: str, step: int, index: int) -> AbstractContextManager[None]:
        # Backward has a seed of its own, since it may not follow at once.
        return seeded(what, self._config.plan.seed, step, index, device=self._replica.device)

    def _loss(self, batch: Batch) -> LossSum:
        try:
            with autocast(self._replica.device.type, self._config.precision):
                return self._task.loss(self._backend.module, batch)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ConfigError(
                f"a batch norm sees one value a channel in a microbatch of {len(batch)} images: "
                "raise --batch-size or --image-size, or lower --microbatches"
            ) from error

    def _next_batch(self) -> Batch:
        with self._timer.phase("split"):
            return self._loader.next().to(self._replica.device, channels_last=self._config.channels_last)

    def _evaluation(self, step: int) -> Iterator[EvaluationReport]:
        begin = time.perf_counter()
        self._backend.pull(PhaseTimer())  # the version just committed, outside of the step's stages
        metric = self._backend.merge_metric(evaluate(self._task, self._replica, self._config))
        if metric is not None:
            yield EvaluationReport(step, self._config.called, metric, time.perf_counter() - begin)
