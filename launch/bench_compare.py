"""Backends beside each other: ratios of rows that ran in the same repeat, with the interval of their median."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from launch.bench_result import RowResult

__all__ = ["Comparison", "compare", "median_interval"]

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """Throughput of one backend over that of another, with equally many workers."""

    scaling: str
    backend: str
    other: str
    workers: int
    ratio: float
    """Median over the repeats."""
    interval95: tuple[float, float] | None
    """Where the median lies with 95% confidence; None if there are too few repeats to say."""
    repeats: int

    @property
    def sentence(self) -> str:
        """One line for people."""
        with_workers = f"with {self.workers} worker{'s' * (self.workers > 1)}"
        if self.other == "baseline":
            what = f"{self.backend} {with_workers} costs {_cost(self.ratio)} over the plain loop"
            bounds = [_cost(bound) for bound in reversed(self.interval95 or ())]
        else:
            what = f"{self.backend} {with_workers} gives {self.ratio:.3f} times the images/s of {self.other}"
            bounds = [f"{bound:.3f}" for bound in self.interval95 or ()]
        sure = f"95% interval {bounds[0]} to {bounds[1]}, " if bounds else ""
        return f"{what} ({sure}{self.repeats} repeat{'s' * (self.repeats > 1)})."


def _cost(ratio: float) -> str:
    return f"{100 * (1 / ratio - 1):.1f}%"


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Order statistics between which the median lies with 95% confidence, whatever the distribution.

    None for fewer than six values. Source: David and Nagaraja, Order Statistics, 3rd edition, section 7.1.
    """
    count = len(values)
    found = None
    tail = 0.0
    for rank in range(1, count // 2 + 1):
        tail += math.comb(count, rank - 1) / 2**count
        if 1 - 2 * tail < _CONFIDENCE:
            break
        found = rank
    if found is None:
        return None
    ordered = sorted(values)
    return ordered[found - 1], ordered[count - found]


def compare(rows: Sequence[RowResult]) -> list[Comparison]:
    """Rows of one kind of scaling: one worker with the plain loop, and ``ps`` with ``ddp``."""
    found = {(row.backend, row.workers): row for row in rows}
    pairs = [(row, found["baseline", 1]) for row in rows if row.backend in ("ps", "ddp") and row.workers == 1]
    pairs += [(row, found["ddp", row.workers]) for row in rows if row.backend == "ps" and ("ddp", row.workers) in found]
    return [_comparison(row, other) for row, other in pairs]


def _comparison(row: RowResult, other: RowResult) -> Comparison:
    ratios = [mine["images_per_s"] / its["images_per_s"] for mine, its in zip(row.repeats, other.repeats, strict=True)]
    return Comparison(
        row.scaling,
        row.backend,
        other.backend,
        row.workers,
        statistics.median(ratios),
        median_interval(ratios),
        len(ratios),
    )
