"""Arithmetic of a benchmark: medians over steps, ratios within a repeat, medians over repeats. Plain numbers."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from launch.bench_plan import Row
from workers.timing import PHASES

__all__ = ["BenchResult", "Equality", "Measurement", "RowResult", "Spread", "TaskResult", "measure", "row_result"]


@dataclass(frozen=True)
class Spread:
    """A quantity over the repeats."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Measurement:
    """One row, run once."""

    images_per_s: float
    """Images of a step over the median step time."""
    step_ms: float
    """Median over the measured steps."""
    phases_ms: dict[str, float]
    """The same for each stage."""


def measure(steps: Sequence[Mapping[str, Any]], batch_size: int, warmup: int) -> Measurement:
    """Medians over ``steps`` (rows with ``step_ms`` and ``phases_ms``) without the first ``warmup`` ones."""
    measured = steps[warmup:]
    step_ms = statistics.median(step["step_ms"] for step in measured)
    phases = {name: statistics.median(step["phases_ms"][name] for step in measured) for name in PHASES}
    return Measurement(1e3 * batch_size / step_ms, step_ms, phases)


@dataclass(frozen=True)
class RowResult:
    """A row over all repeats."""

    scaling: str
    backend: str
    workers: int
    batch_size: int
    """Images of a step over all workers."""
    images_per_s: Spread
    step_ms: Spread
    speedup: Spread
    """Images a second over those of the same repeat's baseline."""
    efficiency: float
    """Median speedup over the number of workers."""
    phases_ms: dict[str, float]
    """Exposed time by stage, median over the repeats."""
    repeats: list[dict[str, Any]]
    """Every measurement, with its own speedup."""
    equal: bool | None = None
    """Whether its backend gave the bits of ``single``; None if unchecked, or not to be expected."""
    command: str = ""
    """What repeats the row by itself."""

    @property
    def name(self) -> str:
        """``ps, 2 workers``."""
        if self.backend in ("baseline", "single"):
            return self.backend
        return f"{self.backend}, {self.workers} worker{'s' * (self.workers > 1)}"


def row_result(
    row: Row,
    own: Sequence[Measurement],
    baseline: Sequence[Measurement],
    *,
    equal: bool | None = None,
    command: str = "",
) -> RowResult:
    """Put the repeats of a row together; ``baseline[r]`` ran just before ``own[r]`` did."""
    speedups = [mine.images_per_s / base.images_per_s for mine, base in zip(own, baseline, strict=True)]
    speedup = Spread.of(speedups)
    return RowResult(
        scaling=row.scaling,
        backend=row.backend,
        workers=row.workers,
        batch_size=row.batch_size,
        images_per_s=Spread.of([mine.images_per_s for mine in own]),
        step_ms=Spread.of([mine.step_ms for mine in own]),
        speedup=speedup,
        efficiency=speedup.median / row.workers,
        phases_ms={name: statistics.median(mine.phases_ms[name] for mine in own) for name in PHASES},
        repeats=[{**asdict(mine), "speedup": ratio} for mine, ratio in zip(own, speedups, strict=True)],
        equal=equal,
        command=command,
    )


@dataclass(frozen=True)
class Equality:
    """What a backend computed in the equality check."""

    backend: str
    workers: int
    servers: int
    """0 where there are none."""
    fingerprint: str
    equal: bool
    """To ``single``."""
    expected: bool
    """Whether the bits must be equal: torch's own sums are in another order in some DDP layouts (E7)."""

    @property
    def sentence(self) -> str:
        """One line for people."""
        short = f"{self.fingerprint[:16]}…"
        if self.backend == "single":
            return f"single: fingerprint {short}"
        who = f"{self.backend}, {self.workers} worker{'s' * (self.workers > 1)}"
        if self.servers:
            who += f", {self.servers} server{'s' * (self.servers > 1)}"
        if self.equal:
            return f"{who}: equal to single (fingerprint {short})"
        if not self.expected:
            return f"{who}: last bits may differ (sum order; fingerprint {short})"
        return f"{who}: DIFFERENT from single (fingerprint {short})"


@dataclass(frozen=True)
class TaskResult:
    """Everything about one task."""

    equality: list[Equality]
    rows: list[RowResult]
    limits: dict[str, list[str]] = field(default_factory=dict)
    """For each kind of scaling, a sentence or more on what limits the speedup of each backend."""

    comparisons: list[dict[str, Any]] = field(default_factory=list)
    """Fields of each ``bench_compare.Comparison``."""

    @property
    def failed(self) -> list[Equality]:
        """Checks that should have given the bits of ``single`` and did not."""
        return [check for check in self.equality if check.expected and not check.equal]

    def rows_of(self, scaling: str) -> list[RowResult]:
        """Rows of one kind of scaling, the baseline first."""
        return [row for row in self.rows if row.scaling == scaling]

    def to_dict(self) -> dict[str, Any]:
        """As it stands in bench.json."""
        limits = " ".join(f"{scaling.capitalize()} scaling: {' '.join(text)}" for scaling, text in self.limits.items())
        return {**asdict(self), "limits": limits}


@dataclass(frozen=True)
class BenchResult:
    """The whole benchmark, as it is reported."""

    name: str
    command: str
    config: dict[str, Any]
    environment: dict[str, Any]
    simulated: bool
    label: str | None
    tasks: dict[str, TaskResult]

    def to_dict(self) -> dict[str, Any]:
        """Content of bench.json."""
        tasks = {name: task.to_dict() for name, task in self.tasks.items()}
        return {**{name: value for name, value in vars(self).items() if name != "tasks"}, "tasks": tasks}
