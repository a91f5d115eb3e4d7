"""Takes a run's reports as they come and keeps its folder: metrics, ledger, checkpoints, summary."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from launch.config import RunConfig
from launch.console import RunConsole
from launch.resolve import Resolved
from launch.run_folder import RunFolder, read_json
from paramserver.fingerprint import fingerprint
from paramserver.state import State
from workers.checkpoint import drop_checkpoints, save_checkpoint
from workers.report import EvaluationReport, StepReport
from workers.timing import PHASES

__all__ = ["Recorder", "checkpoint_meta", "read_steps"]

StateAt = Callable[[int], State]


def checkpoint_steps(every: int, total: int) -> tuple[int, ...]:
    """Versions of which a checkpoint is due during the run; the one at its end comes by itself."""
    return tuple(range(every, total, every)) if every else ()


def read_steps(config: RunConfig, total: int) -> tuple[int, ...]:
    """Versions that are read during the run: for a checkpoint, or for a fingerprint."""
    found = {*checkpoint_steps(config.checkpoint_every, total), *checkpoint_steps(config.fingerprint_every, total)}
    return tuple(sorted(found))


def checkpoint_meta(run: Resolved) -> dict[str, Any]:
    """What must be equal for a checkpoint to be continued with the same data order and arithmetic."""
    plan = run.worker.plan
    return {
        "task": run.task.name,
        "seed": plan.seed,
        "batch_size": plan.batch_size,
        "microbatches": plan.microbatches,
        "drop_last": plan.drop_last,
        "num_samples": run.num_samples,
        "optimizer": run.optimizer.name,
    }


class _Measured(NamedTuple):
    """What the summary needs of a step: the reports themselves would fill the memory of a long run."""

    step_ms: float
    samples: int
    epoch: int
    skipped: bool
    phases_ms: dict[str, float]
    server_ms: Mapping[str, float]


class Recorder:
    """One process of a run writes; ``state_at`` reads a committed or held version.

    Args:
        run: what runs.
        folder: where to.
        console: the terminal.
        state_at: reads the state at a version.
    """

    def __init__(self, run: Resolved, folder: RunFolder, console: RunConsole, state_at: StateAt) -> None:
        self._run = run
        self._folder = folder
        self._console = console
        self._state_at = state_at
        total = run.worker.plan.steps
        self._due = frozenset(checkpoint_steps(run.config.checkpoint_every, total))
        self._fingerprinted = frozenset(checkpoint_steps(run.config.fingerprint_every, total))
        self._read = frozenset(read_steps(run.config, total))
        self._steps: list[_Measured] = []
        self._losses: list[float] = []
        self._metrics: dict[str, float] = {}
        self._evaluated = -1
        self._best: tuple[float, int] | None = None
        """Score and step of the best checkpoint."""
        if (known := folder.checkpoints / "best.json").exists():
            row = read_json(known)
            self._best = (row["score"], row["step"])
        self._started = time.time()

    def take(self, report: StepReport | EvaluationReport) -> None:
        """Write one report down."""
        if isinstance(report, EvaluationReport):
            self._metrics = report.metric.compute()
            self._evaluated = report.step
            self._note_best(report.step)
            self._folder.append("evaluations.jsonl", {"step": report.step, **self._metrics})
            self._console.evaluation(report, self._metrics)
            return
        # Whoever knew how long the step took may be dead.
        images_per_s = 1e3 * report.samples / report.step_ms if report.step_ms else math.nan
        self._folder.append("ledger.jsonl", _ledger_row(report))
        state = self._state_at(report.step) if report.step in self._read and not report.stop else None
        fingerprinted = state if report.step in self._fingerprinted else None
        self._folder.append("metrics.jsonl", self._metrics_row(report, images_per_s, fingerprinted))
        self._console.step(report, images_per_s)
        commit = report.commit
        self._steps.append(
            _Measured(report.step_ms, report.samples, report.epoch, commit.skipped, report.phases_ms, commit.server_ms)
        )
        self._losses.append(report.loss)
        if state is not None and report.step in self._due:
            self.save(state)

    def _metrics_row(self, report: StepReport, images_per_s: float, state: State | None) -> dict[str, Any]:
        marks = {} if state is None else {"fingerprint": fingerprint(state.everything())}
        return {
            **marks,
            "step": report.step,
            "epoch": report.epoch,
            "loss": report.loss,
            "lr": report.commit.lr,
            "images_per_s": images_per_s,
            "phases_ms": report.phases_ms,
            "server_ms": dict(report.commit.server_ms),
            "step_ms": report.step_ms,
            "workers": self._run.worker.num_workers,
            "skipped": report.commit.skipped,
            "grad_norm": report.commit.grad_norm,
        }

    def save(self, state: State) -> None:
        """Write a checkpoint."""
        # The residuals' dtype does not stop a resume: with another one they are dropped.
        meta = {**checkpoint_meta(self._run), "wire_precision": self._run.config.wire_precision}
        save_checkpoint(self._folder.checkpoints, state, meta)
        self._note_best(state.version)
        self._drop_old()

    def _note_best(self, step: int) -> None:
        """Note a checkpoint that was evaluated, too, if it is the best so far."""
        if step != self._evaluated or not (self._folder.checkpoints / f"step_{step}").exists():
            return
        name = self._run.config.best_metric or next(iter(self._metrics), "")
        value = self._metrics.get(name.removeprefix("-"), math.nan)
        score = -value if name.startswith("-") else value
        if not math.isnan(score) and (self._best is None or score > self._best[0]):
            self._best = (score, step)
            row = {"step": step, "metric": name.removeprefix("-"), "value": value, "score": score}
            self._folder.write("checkpoints/best.json", row)

    def _drop_old(self) -> None:
        if keep := self._run.config.keep_checkpoints:
            drop_checkpoints(self._folder.checkpoints, keep, {self._best[1]} if self._best else set())

    def finish(self, state: State) -> dict[str, Any]:
        """Write the last checkpoint and summary.json; gives the summary back."""
        self.save(state)
        summary = self._summary(state)
        self._folder.write("summary.json", summary)
        return summary

    def _summary(self, state: State) -> dict[str, Any]:
        config = self._run.config
        # The first step of a process builds caches and graphs: it is no measure of the others.
        measured = [step for step in self._steps[1:] or self._steps if not math.isnan(step.step_ms)]
        times = [report.step_ms for report in measured]
        median = statistics.median(times) if times else float("nan")
        samples = statistics.median([report.samples for report in measured]) if measured else 0
        return {
            "task": self._run.task.name,
            "backend": config.backend,
            "workers": config.workers,
            "servers": config.servers if config.backend == "ps" else 0,
            "microbatches": config.microbatches,
            "batch_size": config.batch_size,
            "steps": state.version,
            "epochs": self._steps[-1].epoch + 1 if self._steps else 0,
            "images_per_s": 1e3 * samples / median if times else float("nan"),
            "step_ms": {"median": median, "p90": _quantile(times, 0.9)},
            "phases_ms": {name: _median(report.phases_ms[name] for report in measured) for name in PHASES},
            "phases_percent": _percent(measured),
            "server_ms": _median_by_name([report.server_ms for report in measured]),
            "loss": {"first": _at(self._losses, 0), "last": _at(self._losses, -1)},
            "metrics": self._metrics,
            "skipped_steps": sum(report.skipped for report in self._steps),
            "fingerprint": fingerprint(state.state_dict()),
            "state_fingerprint": fingerprint(state.everything()),
            "simulated": self._run.simulated,
            "threads_per_device": config.threads,
            "precision": config.precision,
            "compile": config.compile,
            "wire_precision": config.wire_precision,
            "channels_last": config.channels_last,
            "data": config.data,
            "recipe": config.recipe,
            "seed": config.seed,
            "duration_s": time.time() - self._started,
        }


def _percent(steps: list[_Measured]) -> dict[str, float]:
    """Share of each stage in the time of all steps; what is missing to 100 belongs to no stage."""
    total = sum(report.step_ms for report in steps)
    if not total:
        return dict.fromkeys(PHASES, float("nan"))
    return {name: 100 * sum(report.phases_ms[name] for report in steps) / total for name in PHASES}


def _ledger_row(report: StepReport) -> dict[str, Any]:
    rows = [{"index": row.microbatch, "worker": row.worker, "samples": row.samples} for row in report.ledger]
    return {"step": report.step, "epoch": report.epoch, "microbatches": rows}


def _median(values: Any) -> float:
    found = list(values)
    return statistics.median(found) if found else float("nan")


def _median_by_name(rows: list[Mapping[str, float]]) -> dict[str, float]:
    return {name: _median(row.get(name, 0.0) for row in rows) for name in (rows[0] if rows else {})}


def _quantile(values: list[float], share: float) -> float:
    """The value at ``share`` of the sorted list, nearest rank."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _at(values: list[float], index: int) -> float:
    return values[index] if values else float("nan")
