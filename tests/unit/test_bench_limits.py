"""The sentence below a table."""

import pytest

from launch.bench_limits import explain, phase_shares
from tests.support.bench_results import task_result


def test_shares_are_sorted_and_small_ones_left_out() -> None:
    row = task_result().rows_of("weak")[2]
    assert (row.backend, row.workers) == ("ps", 2)
    assert phase_shares(row) == "compute 86%, aggregate 10%, split 3%, push 1%"
    assert phase_shares(row, most=1) == "compute 86%"


@pytest.mark.parametrize(
    ("slow", "words"),
    [
        (1.10, "compute itself is 9% slower for each image than in the baseline (cores share caches and memory"),
        (0.80, "compute itself is 20% faster for each image than in the baseline"),
        (1.02, "compute itself is as fast as in the baseline"),
    ],
)
def test_compute_is_compared_with_the_baseline(slow: float, words: str) -> None:
    assert words in explain(task_result(slow).rows_of("weak"), servers=1, cores=2)[0]


def test_sentence_says_what_is_lost_where() -> None:
    text, other = explain(task_result().rows_of("weak"), servers=1, cores=2)
    assert text.startswith("ps with 2 workers spends 86% of a step computing, 10% in aggregate (waiting for other")
    assert "aggregate adds 12 ms" in text
    assert "at a speedup of 2" in text
    assert "2 workers and 1 server share 2 cores." in text
    assert other.startswith("ddp with 2 workers"), "one for each backend, at its largest number of workers"


def test_strong_scaling_is_compared_for_each_image() -> None:
    text, _ = explain(task_result(1.2).rows_of("strong"), servers=1, cores=2)
    assert "a device is less efficient on fewer images at a time" in text
    assert "would take 54 ms" in text, "half of the baseline's step"


def test_gpus_share_no_cores() -> None:
    assert "share" not in " ".join(explain(task_result(1.2).rows_of("weak"), servers=1, cores=None))
