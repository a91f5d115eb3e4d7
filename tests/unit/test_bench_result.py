"""Arithmetic of a benchmark: which medians, which ratios."""

import pytest

from launch.bench_equality import ddp_adds_in_tree_order
from launch.bench_plan import BASELINE, Row
from launch.bench_result import Equality, Measurement, Spread, TaskResult, measure, row_result
from workers.timing import PHASES


def steps_of(*times_ms: float) -> list[dict]:
    return [{"step_ms": ms, "phases_ms": dict.fromkeys(PHASES, 0.0) | {"compute": ms / 2}} for ms in times_ms]


def once(images_per_s: float, batch_size: int = 8) -> Measurement:
    return Measurement(images_per_s, 1e3 * batch_size / images_per_s, dict.fromkeys(PHASES, 1.0))


def test_warm_up_steps_are_dropped_and_the_median_is_taken() -> None:
    found = measure(steps_of(900.0, 800.0, 10.0, 500.0, 20.0), batch_size=4, warmup=2)
    assert found.step_ms == 20.0
    assert found.images_per_s == pytest.approx(200.0)
    assert found.phases_ms["compute"] == 10.0


def test_speedup_is_the_median_of_the_ratios_within_a_repeat() -> None:
    # The machine was half as fast in the second repeat: both rows were, so the ratio does not see it.
    row = Row("weak", "ps", 2, 16)
    result = row_result(row, [once(180.0), once(80.0), once(210.0)], [once(100.0), once(50.0), once(100.0)])
    assert result.speedup == Spread(1.8, 1.6, 2.1)
    assert result.efficiency == pytest.approx(0.9)
    assert result.images_per_s == Spread(180.0, 80.0, 210.0)
    assert [repeat["speedup"] for repeat in result.repeats] == [1.8, 1.6, 2.1]


def test_the_baseline_is_at_one_in_every_repeat() -> None:
    own = [once(100.0), once(50.0)]
    result = row_result(Row("weak", BASELINE, 1, 8), own, own)
    assert (result.speedup, result.efficiency) == (Spread(1.0, 1.0, 1.0), 1.0)


def test_a_missing_repeat_is_an_error() -> None:
    with pytest.raises(ValueError, match="longer"):
        row_result(Row("weak", "ps", 1, 8), [once(1.0)], [once(1.0), once(1.0)])


@pytest.mark.parametrize(
    ("workers", "microbatches", "expected"),
    [(1, 1, True), (1, 3, True), (1, 4, False), (2, 2, True), (2, 4, True), (2, 8, False), (4, 4, False)],
)
def test_where_ddp_adds_along_the_tree(workers: int, microbatches: int, expected: bool) -> None:
    assert ddp_adds_in_tree_order(workers, microbatches) is expected


@pytest.mark.parametrize(
    ("equal", "expected", "words"),
    [
        (True, True, "ps, 2 workers, 3 servers: equal to single (fingerprint 0123456789abcdef…)"),
        (False, True, "DIFFERENT from single"),
        (False, False, "last bits may differ (sum order"),
    ],
)
def test_equality_says_what_was_found(equal: bool, expected: bool, words: str) -> None:
    check = Equality("ps", 2, 3, "0123456789abcdef" * 4, equal, expected)
    assert words in check.sentence
    assert TaskResult([check], []).failed == ([check] if expected and not equal else [])
