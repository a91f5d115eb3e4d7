"""``pushpull bench``: first whether all backends compute the same, then how much faster they are than one device."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from launch.bench_compare import compare
from launch.bench_config import BenchConfig
from launch.bench_equality import check_equality
from launch.bench_limits import explain
from launch.bench_plan import Row, TaskPlan, plan_task, row_command
from launch.bench_result import BenchResult, Equality, Measurement, TaskResult, row_result
from launch.bench_runner import BenchStopped, Runner, open_runner
from launch.environment import environment
from launch.report import write_report
from launch.report_console import ReportConsole
from paramserver.errors import ConfigError

__all__ = ["bench"]

_DIFFERENT = 1


def bench(tasks: list[str], config: BenchConfig) -> int:
    """Measure ``tasks`` and write ``OUT/NAME/``; gives the exit code: 1 if bits differ that should not.

    Raises:
        ConfigError: if a row cannot run, or the folder is there already.
        PushPullError: if a row failed.
    """
    folder = _choose_folder(config)
    plans = _plan(tasks, config)
    result = BenchResult(
        name=folder.name,
        command=config.command(tasks),
        config={"tasks": tasks, **config.to_dict()},
        environment=environment(),
        simulated=plans[0].simulated,
        label=config.label,
        tasks={},
    )
    console = ReportConsole(result)
    console.header()
    try:
        with open_runner(plans, config) as runner:
            for plan in plans:
                equality = check_equality(plan, runner)
                console.equality(plan.name, equality)
                result.tasks[plan.name] = _measure(plan, config, runner, equality, result)
                console.speed(plan.name)
    except BenchStopped as stopped:
        console.stopped()
        return stopped.exit_code
    _replace(folder)
    write_report(result, folder)
    console.end(folder)
    return _DIFFERENT if any(task.failed for task in result.tasks.values()) else 0


def _plan(tasks: Sequence[str], config: BenchConfig) -> list[TaskPlan]:
    plans = [plan_task(task, config) for task in tasks]
    names = [plan.name for plan in plans]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two tasks are called {name}: measure them one after the other, with another --name")
    return plans


def _measure(
    plan: TaskPlan, config: BenchConfig, runner: Runner, equality: list[Equality], result: BenchResult
) -> TaskResult:
    """All rows, interleaved: what slows the machine down for a while slows all rows of a repeat down."""
    measured: dict[Row, list[Measurement]] = {row: [] for row in plan.rows}
    for _ in range(config.repeats):
        for row, run_config in plan.rows.items():
            measured[row].append(runner.measure(plan.name, row, run_config))
    baselines = {row.scaling: measured[row] for row in plan.rows if row.is_baseline}
    rows = [
        row_result(
            row,
            measured[row],
            baselines[row.scaling],
            equal=_equal(row, equality),
            command=row_command(row, run_config),
        )
        for row, run_config in plan.rows.items()
    ]
    cores = result.environment["cpu_cores"] if plan.simulated else None
    task = TaskResult(equality, rows)
    for scaling in config.scalings:
        of_scaling = task.rows_of(scaling)
        comparisons = compare(of_scaling)
        task.comparisons.extend(asdict(comparison) for comparison in comparisons)
        limits = explain(of_scaling, servers=config.servers, cores=cores)
        task.limits[scaling] = [*limits, *(comparison.sentence for comparison in comparisons)]
    return task


def _equal(row: Row, equality: Sequence[Equality]) -> bool | None:
    """Whether the row's backend passed the check at its number of workers; None where there is nothing to say."""
    for check in equality:
        if (check.backend, check.workers) == (row.backend, row.workers):
            return True if check.equal else (False if check.expected else None)
    return None


def _choose_folder(config: BenchConfig) -> Path:
    """The benchmark's folder, made now, so that an hour of measurements does not end at a full or read-only disk.

    Raises:
        ConfigError: if it has something in it that may not be replaced, or cannot be made.
    """
    path = Path(config.out).expanduser() / (config.name or f"bench-{time.strftime('%Y%m%d-%H%M%S')}")
    if path.exists() and any(path.iterdir()):
        if not config.overwrite:
            raise ConfigError(f"{path} exists: choose another --name, or say --overwrite")
        if not (path / "bench.json").exists():
            raise ConfigError(f"--overwrite: {path} is not a benchmark's folder (it has no bench.json), so it stays")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: cannot write to {path}: {error.strerror}") from error
    return path


def _replace(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
