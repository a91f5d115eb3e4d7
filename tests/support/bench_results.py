"""A made-up benchmark, so that reports can be tested without one."""

from typing import get_args

from launch.bench_config import BenchConfig, Scaling
from launch.bench_limits import explain
from launch.bench_plan import BASELINE, Row
from launch.bench_result import BenchResult, Equality, Measurement, TaskResult, row_result
from workers.timing import PHASES

_FINGERPRINT = "0123456789abcdef" * 4


def phases(**known_ms: float) -> dict[str, float]:
    return dict.fromkeys(PHASES, 0.0) | known_ms


def measurement(batch_size: int, **known_ms: float) -> Measurement:
    step_ms = sum(known_ms.values())
    return Measurement(1e3 * batch_size / step_ms, step_ms, phases(**known_ms))


def task_result(slow: float = 1.05, *, equal: bool = True) -> TaskResult:
    """Two workers whose compute is ``slow`` times the baseline's 100 ms for 8 images."""
    rows = []
    for scaling in get_args(Scaling):
        baseline = [measurement(8, split=4.0, compute=100.0 + noise, update=2.0) for noise in (0.0, 3.0, 9.0)]
        rows.append(row_result(Row(scaling, BASELINE, 1, 8), baseline, baseline))
        for backend in ("ps", "ddp"):
            for workers in (1, 2):
                batch = 8 * workers if scaling == "weak" else 8
                share = batch / workers / 8
                own = [
                    measurement(
                        batch,
                        split=4.0 * share,
                        compute=100.0 * share * slow + noise,
                        push=1.5,
                        aggregate=6.0 * workers,
                    )
                    for noise in (1.0, 2.0, 4.0)
                ]
                row = Row(scaling, backend, workers, batch)
                rows.append(row_result(row, own, baseline, equal=equal or None, command=f"pushpull train {backend}"))
    checks = [
        Equality("single", 1, 0, _FINGERPRINT, True, True),
        Equality("ps", 2, 1, _FINGERPRINT if equal else "f" * 64, equal, True),
        Equality("ddp", 4, 0, "e" * 64, False, False),
    ]
    task = TaskResult(checks, rows)
    for scaling in get_args(Scaling):
        task.limits[scaling] = explain(task.rows_of(scaling), servers=1, cores=2)
    return task


def bench_result(label: str | None = "<b>demo</b> size") -> BenchResult:
    """One task; the label must not get into a page as markup."""
    config = BenchConfig(label=label)
    environment = {
        "cpu_cores": 2,
        "cpu": "some CPU",
        "gpus": [],
        "commit": None,
        "packages": {"torch": "2.14.1", "ray": "2.60.0"},
    }
    return BenchResult(
        name="made-up",
        command=config.command(["ssd"]),
        config={"tasks": ["ssd"], **config.to_dict()},
        environment=environment,
        simulated=True,
        label=label,
        tasks={"ssd": task_result()},
    )
