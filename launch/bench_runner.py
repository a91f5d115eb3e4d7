"""Runs the rows of a benchmark one after the other, in run folders that are thrown away."""

import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.bench_baseline import run_baseline
from launch.bench_config import BenchConfig
from launch.bench_plan import Row, TaskPlan
from launch.bench_result import Measurement, measure
from launch.config import Backend, RunConfig
from launch.drivers import param_server_session
from launch.run_folder import RunFolder
from launch.signals import StopFlag, stop_on_sigterm
from launch.train import EXIT_SIGTERM, run
from paramserver.errors import PushPullError

__all__ = ["BenchStopped", "Runner", "open_runner"]


class BenchStopped(Exception):
    """SIGTERM came: the rows that were not run yet are left out, so there is nothing to report."""

    exit_code = EXIT_SIGTERM


class Runner:
    """Runs one thing at a time and waits for it, so that nothing else uses the machine.

    Args:
        out: folder for the run folders.
        config: the benchmark's settings.
        total: runs there will be.
        stop: asked before each of them.
    """

    def __init__(self, out: Path, config: BenchConfig, total: int, stop: StopFlag) -> None:
        self._out = out
        self._config = config
        self._total = total
        self._stop = stop
        self._done = 0

    def measure(self, task: str, row: Row, run_config: RunConfig) -> Measurement:
        """Train a row once."""
        what = f"{task}, {row.scaling} scaling, {row.backend} with {row.workers} worker{'s' * (row.workers > 1)}"
        with self._next(what) as say:
            if row.is_baseline:
                steps = [{"step_ms": sum(phases.values()), "phases_ms": phases} for phases in run_baseline(run_config)]
            else:
                steps = self._train(run_config)[1]
            measurement = measure(steps, row.batch_size, self._config.warmup)
            say(f"{measurement.images_per_s:.1f} images/s")
        return measurement

    def check(self, task: str, backend: Backend, workers: int, run_config: RunConfig) -> tuple[str, int]:
        """Fingerprint after the few steps of the equality check, and how many servers there were."""
        with self._next(f"{task}, equality, {backend} with {workers} worker{'s' * (workers > 1)}") as say:
            summary, _ = self._train(run_config)
            say(f"fingerprint {summary['fingerprint'][:16]}…")
        return summary["fingerprint"], summary["servers"]

    def _train(self, run_config: RunConfig) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Summary and rows of metrics.jsonl of a run, whose folder is gone again."""
        named = replace(run_config, out=str(self._out), name=f"run-{self._done}")
        result = run(named, quiet=True, in_session=True)
        if result.exit_code:
            raise BenchStopped
        steps = list(RunFolder(result.folder).rows("metrics.jsonl"))
        shutil.rmtree(result.folder)
        return result.summary, steps

    @contextmanager
    def _next(self, what: str) -> Iterator[Any]:
        """Count, name a failure's row, and say on standard error how it went."""
        if self._stop.requested:
            raise BenchStopped
        self._done += 1
        try:
            yield lambda text: print(f"[{self._done}/{self._total}] {what}: {text}", file=sys.stderr, flush=True)
        except PushPullError as error:
            if self._stop.requested:  # whoever stopped us stopped our child too
                raise BenchStopped from error
            raise PushPullError(f"{what}: {error}") from error


@contextmanager
def open_runner(plans: Sequence[TaskPlan], config: BenchConfig) -> Iterator[Runner]:
    """A runner with one Ray session for all ``ps`` rows of all tasks."""
    total = sum(len(plan.equality) + config.repeats * len(plan.rows) for plan in plans)
    with ExitStack() as stack:
        out = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pushpull-bench-")))
        if "ps" in config.backend_names:
            model_bytes = max(plan.model_bytes for plan in plans)
            stack.enter_context(param_server_session(None, max(config.worker_counts), config.servers, model_bytes))
        yield Runner(out, config, total, stack.enter_context(stop_on_sigterm()))
