"""Ratios of rows within a repeat, and what is said of them."""

import pytest

from launch.bench_compare import compare, median_interval
from launch.bench_plan import Row
from launch.bench_result import Measurement, RowResult, row_result
from workers.timing import PHASES


def _row(backend: str, workers: int, images_per_s: list[float]) -> RowResult:
    own = [Measurement(value, 1e3 / value, dict.fromkeys(PHASES, 0.0)) for value in images_per_s]
    return row_result(Row("weak", backend, workers, 4 * workers), own, own)


@pytest.mark.parametrize(
    ("count", "ranks"), [(1, None), (5, None), (6, (1, 6)), (8, (1, 8)), (9, (2, 8)), (20, (6, 15)), (25, (8, 18))]
)
def test_interval_of_the_median_is_that_of_the_binomial_table(count: int, ranks: tuple[int, int] | None) -> None:
    values = [float(value) for value in range(1, count + 1)]
    assert median_interval(values[::-1]) == ranks


def test_rows_are_compared_within_their_repeat() -> None:
    """The machine became ten times slower from repeat to repeat; the ratio did not change."""
    speeds = [100.0, 10.0, 1.0] * 2
    rows = [
        _row("baseline", 1, speeds),
        _row("ps", 1, [0.8 * speed for speed in speeds]),
        _row("ps", 2, [1.8 * speed for speed in speeds]),
        _row("ddp", 2, [1.5 * speed for speed in speeds]),
    ]
    one, two = compare(rows)
    assert (one.backend, one.other, one.workers) == ("ps", "baseline", 1)
    assert (two.backend, two.other, two.workers) == ("ps", "ddp", 2)
    assert one.ratio == pytest.approx(0.8)
    assert two.ratio == pytest.approx(1.2)
    assert one.sentence == "ps with 1 worker costs 25.0% over the plain loop (95% interval 25.0% to 25.0%, 6 repeats)."
    assert two.sentence == (
        "ps with 2 workers gives 1.200 times the images/s of ddp (95% interval 1.200 to 1.200, 6 repeats)."
    )


def test_few_repeats_have_no_interval() -> None:
    (only,) = compare([_row("baseline", 1, [2.0]), _row("ddp", 1, [1.0])])
    assert only.interval95 is None
    assert only.sentence == "ddp with 1 worker costs 100.0% over the plain loop (1 repeat)."
