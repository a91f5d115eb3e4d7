"""Each step is told once, in order, with each sample once, whoever died before it could report."""

import math
import random

import pytest

from cluster.reports import Merger
from paramserver.messages import Commit, MicrobatchStats
from workers.config import PlanConfig
from workers.minibatch import MinibatchPlan, deal_runs
from workers.report import EvaluationReport, LedgerRow, StepReport
from workers.timing import PHASES

PLAN = MinibatchPlan(PlanConfig(batch_size=6, microbatches=4, steps=8), 20)


class Count:
    """A metric that adds ones up."""

    def __init__(self) -> None:
        self.parts = 1

    def merge(self, other: "Count") -> None:
        self.parts += other.parts


def _commit(step: int, generation: int = 0, *, stop: bool = False) -> Commit:
    stats = tuple(MicrobatchStats(index, 1.0, 2.0, 1) for index in range(4))
    return Commit(step, stats, 0.1, stop=stop, generation=generation)


def _report(step: int, worker: int, run: range, generation: int = 0) -> StepReport:
    microbatches = PLAN.microbatches(step - 1)
    last = step == PLAN.config.steps
    return StepReport(
        step=step,
        epoch=PLAN.epoch(step - 1),
        worker=worker,
        commit=_commit(step, generation, stop=last),
        ledger=tuple(LedgerRow(index, worker, microbatches[index]) for index in run),
        step_ms=10.0,
        phases_ms=dict.fromkeys(PHASES, 1.0),
        stop=last,
    )


def _samples(report: StepReport) -> list[list[int]]:
    return [row.samples for row in report.ledger]


def _merger(workers: int = 2) -> tuple[Merger, list[range]]:
    merger, runs = Merger(PLAN, 0), deal_runs(4, workers)
    merger.begin(0, 0, dict(enumerate(runs)))
    return merger, runs


def test_a_step_is_whole_once_all_have_reported_it() -> None:
    merger, runs = _merger()
    merger.add(0, 1, _report(1, 1, runs[1]))
    assert list(merger.take()) == []
    merger.add(0, 0, _report(1, 0, runs[0]))
    (whole,) = merger.take()
    assert isinstance(whole, StepReport)
    assert [row.worker for row in whole.ledger] == [0, 0, 1, 1]
    assert _samples(whole) == PLAN.microbatches(0)


def test_what_the_dead_computed_is_filled_in_from_the_plan() -> None:
    merger, runs = _merger()
    merger.add(0, 0, _report(1, 0, runs[0]))
    merger.ended(0, 1)
    (whole,) = merger.take()
    assert isinstance(whole, StepReport)
    assert [row.worker for row in whole.ledger] == [0, 0, 1, 1]
    assert _samples(whole) == PLAN.microbatches(0)


def test_steps_that_nobody_lives_to_report_are_made_up_from_commits() -> None:
    merger, runs = _merger(workers=1)
    merger.add(0, 0, _report(1, 0, runs[0]))
    merger.ended(0, 0)
    merger.learn([_commit(2), _commit(3)])
    merger.begin(1, 3, {1: range(4)})
    told = list(merger.take())
    assert [report.step for report in told] == [1, 2, 3]
    last = told[-1]
    assert isinstance(last, StepReport)
    assert math.isnan(last.step_ms)
    assert last.loss == 0.5
    assert _samples(last) == PLAN.microbatches(2)


def test_the_next_generation_waits_for_the_last_words_of_the_one_before() -> None:
    merger, runs = _merger()
    merger.begin(1, 1, {0: range(4)})
    merger.add(1, 0, _report(2, 0, range(4), generation=1))
    assert list(merger.take()) == []
    for number in range(2):
        merger.add(0, number, _report(1, number, runs[number]))
        merger.ended(0, number)
    assert [report.step for report in merger.take()] == [1, 2]


def test_steps_replayed_from_a_checkpoint_are_told_once() -> None:
    merger, runs = _merger()
    for step in (1, 2, 3):
        for number in range(2):
            merger.add(0, number, _report(step, number, runs[number]))
    assert len(list(merger.take())) == 3
    for number in range(2):
        merger.ended(0, number)
    merger.begin(1, 1, {0: range(4)})
    for step in (2, 3, 4):
        merger.add(1, 0, _report(step, 0, range(4), generation=1))
    assert [report.step for report in merger.take()] == [4]


def test_an_evaluation_that_somebody_did_not_finish_is_told_by_those_who_do_it_again() -> None:
    merger, runs = _merger()
    for number in range(2):
        merger.add(0, number, _report(1, number, runs[number]))
    merger.add(0, 0, EvaluationReport(1, 0, Count(), 0.1))  # type: ignore[arg-type]
    assert len(list(merger.take())) == 1
    for number in range(2):
        merger.ended(0, number)
    merger.begin(1, 1, {0: range(4)})
    merger.add(1, 0, EvaluationReport(1, 0, Count(), 0.1))  # type: ignore[arg-type]
    (told,) = merger.take()
    assert isinstance(told, EvaluationReport)
    assert merger.evaluated == 1


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_reports_and_deaths_tells_every_step_once(seed: int) -> None:
    dice = random.Random(seed)
    merger, version = Merger(PLAN, 0), 0
    told: list[StepReport | EvaluationReport] = []
    generation = 0
    while version < PLAN.config.steps:
        numbers = dice.sample(range(6), dice.randint(1, 4))
        runs = dict(zip(numbers, deal_runs(4, len(numbers)), strict=True))
        merger.begin(generation, version, runs)
        reached = dice.randint(version, PLAN.config.steps)
        words = {n: list(range(version + 1, reached + 1 - dice.choice([0, 0, 1, 2]))) for n in numbers}
        merger.learn(_commit(step, generation) for step in range(version + 1, reached + 1))
        while words:
            number = dice.choice(list(words))
            if words[number]:
                step = words[number].pop(0)
                merger.add(generation, number, _report(step, number, runs[number], generation))
            else:
                del words[number]
                merger.ended(generation, number)
            told += merger.take()
        version, generation = reached, generation + 1
    merger.begin(generation, version, {})
    told += merger.take()
    assert [report.step for report in told] == list(range(1, PLAN.config.steps + 1))
    for report in told:
        assert isinstance(report, StepReport)
        assert _samples(report) == PLAN.microbatches(report.step - 1)
    assert merger.stopped
