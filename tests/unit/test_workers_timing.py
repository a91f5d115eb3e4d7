"""Eight stages, the same eight names everywhere; time is moved between them, never made."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from paramserver.messages import Commit, MicrobatchStats
from workers import timing
from workers.report import LedgerRow, StepReport, merge_steps
from workers.timing import PHASES, PhaseTimer


class _Clock:
    """A clock that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def fail_after(self, seconds: float) -> None:
        self.now += seconds
        raise RuntimeError


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    return _Clock(monkeypatch)


def test_the_eight_names_in_the_order_of_the_gradients_way() -> None:
    assert PHASES == ("split", "pull", "compute", "reduce", "push", "aggregate", "update", "commit")
    assert tuple(PhaseTimer().take_ms()) == PHASES
    assert set(PhaseTimer().take_ms().values()) == {0.0}


def test_times_add_up_until_they_are_taken(clock: _Clock) -> None:
    timer = PhaseTimer()
    for seconds in (1.0, 0.5):
        with timer.phase("pull"):
            clock.now += seconds
        clock.now += 10  # between phases: nobody's
    with pytest.raises(RuntimeError), timer.phase("push"):
        clock.fail_after(0.25)
    assert timer.take_ms() == {**dict.fromkeys(PHASES, 0.0), "pull": 1500.0, "push": 250.0}
    assert set(timer.take_ms().values()) == {0.0}


def test_what_a_device_does_while_nobody_looks_is_booked(clock: _Clock) -> None:
    timer = PhaseTimer()
    timer.book(0.5, "compute")
    with timer.phase("compute"):
        clock.now += 1.0
    assert timer.take_ms()["compute"] == 1500.0


def test_stages_have_their_names_in_a_trace(clock: _Clock) -> None:
    seen: list[str] = []

    @contextmanager
    def around(name: str) -> Iterator[None]:
        seen.append(name)
        yield
        seen.append(f"end of {name}")

    timer = PhaseTimer(seen.append, around)
    with timer.phase("push"):
        clock.now += 0.25
    assert seen == ["push", "push", "end of push"]
    assert timer.take_ms()["push"] == 250.0


@pytest.mark.parametrize(("asked", "moved"), [(0.25, 0.25), (1.0, 1.0), (5.0, 1.0), (0.0, 0.0)])
def test_no_more_is_moved_than_there_is(clock: _Clock, asked: float, moved: float) -> None:
    timer = PhaseTimer()
    with timer.phase("aggregate"):
        clock.now += 1.0
    timer.move(asked, "aggregate", "update")
    taken = timer.take_ms()
    assert (taken["aggregate"], taken["update"]) == (1000 * (1 - moved), 1000 * moved)


def test_an_unknown_stage_is_a_mistake() -> None:
    with pytest.raises(KeyError), PhaseTimer().phase("wait"):
        pass


def _report(worker: int, ms: float, rows: list[LedgerRow], stats: tuple[MicrobatchStats, ...] = ()) -> StepReport:
    return StepReport(
        step=3,
        epoch=0,
        worker=worker,
        commit=Commit(version=3, stats=stats, lr=0.1),
        ledger=tuple(rows),
        step_ms=ms,
        phases_ms=dict.fromkeys(PHASES, ms),
        stop=False,
    )


def test_reports_of_several_workers_become_one_with_mean_times_and_the_whole_ledger() -> None:
    late = _report(1, 30.0, [LedgerRow(2, 1, [7]), LedgerRow(3, 1, [])])
    early = _report(0, 10.0, [LedgerRow(0, 0, [5, 6]), LedgerRow(1, 0, [4])])
    merged = merge_steps([late, early])
    assert (merged.worker, merged.step_ms, merged.phases_ms) == (0, 20.0, dict.fromkeys(PHASES, 20.0))
    assert [row.microbatch for row in merged.ledger] == [0, 1, 2, 3]
    assert merged == merge_steps([early, late])


@pytest.mark.parametrize(
    ("rows", "loss", "samples"),
    [
        ([(6.0, 2.0, 2), (2.0, 2.0, 3)], 2.0, 5),
        ([(3.0, 0.0, 2)], 3.0, 2),
        ([(3.0, 0.5, 2), (0.0, 0.0, 0)], 3.0, 2),
    ],
)
def test_the_loss_of_a_step_is_sum_of_sums_over_sum_of_weights(
    rows: list[tuple[float, float, int]], loss: float, samples: int
) -> None:
    stats = tuple(MicrobatchStats(index, *row) for index, row in enumerate(rows))
    report = _report(0, 1.0, [], stats)
    assert (report.loss, report.samples) == (loss, samples)
