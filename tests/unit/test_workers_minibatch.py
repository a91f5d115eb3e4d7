"""Which sample goes where: every one exactly once an epoch, whoever computes it (E6)."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paramserver.errors import ConfigError
from workers.config import PlanConfig
from workers.minibatch import MinibatchPlan, deal_runs, steps_in_epoch


def _plan(num_samples: int, batch_size: int, microbatches: int, **settings: object) -> MinibatchPlan:
    config = PlanConfig(batch_size=batch_size, microbatches=microbatches, steps=100, **settings)  # type: ignore[arg-type]
    return MinibatchPlan(config, num_samples)


@st.composite
def plans(draw: st.DrawFn) -> MinibatchPlan:
    batch_size = draw(st.integers(1, 20))
    drop_last = draw(st.booleans())
    num_samples = draw(st.integers(batch_size if drop_last else 1, 60))
    microbatches = draw(st.integers(1, batch_size))
    return _plan(num_samples, batch_size, microbatches, drop_last=drop_last, seed=draw(st.integers(0, 5)))


@settings(deadline=None)
@given(plans(), st.integers(0, 3))
def test_an_epoch_has_every_sample_exactly_once(plan: MinibatchPlan, epoch: int) -> None:
    first = epoch * plan.steps_per_epoch
    minibatches = [plan.microbatches(first + step) for step in range(plan.steps_per_epoch)]
    assert {plan.epoch(first + step) for step in range(plan.steps_per_epoch)} == {epoch}
    seen = [sample for minibatch in minibatches for part in minibatch for sample in part]
    assert len(seen) == len(set(seen))
    left_out = plan.num_samples % plan.config.batch_size if plan.config.drop_last else 0
    assert len(seen) == plan.num_samples - left_out
    assert set(seen) <= set(range(plan.num_samples))
    for minibatch in minibatches:
        sizes = [len(part) for part in minibatch]
        assert len(sizes) == plan.config.microbatches
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] - sizes[-1] <= 1
    for minibatch in minibatches[:-1]:
        assert sum(map(len, minibatch)) == plan.config.batch_size


@settings(deadline=None)
@given(plans(), st.integers(0, 200))
def test_it_is_a_pure_function_of_the_plan(plan: MinibatchPlan, step: int) -> None:
    again = MinibatchPlan(plan.config, plan.num_samples)
    wanted = again.microbatches(step)
    for other in (step + 1, 0, 77):
        plan.microbatches(other)
    assert plan.microbatches(step) == wanted


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [_plan(50, 50, 1, seed=seed).microbatches(epoch)[0] for seed in range(3) for epoch in range(3)]
    assert all(one != other for one, other in itertools.combinations(orders, 2))
    assert sorted(orders[0]) == list(range(50))


def test_the_first_microbatches_have_one_more_and_the_last_may_be_empty() -> None:
    plan = _plan(31, 15, 4)
    assert plan.steps_per_epoch == 3
    assert [[len(part) for part in plan.microbatches(step)] for step in range(4)] == [
        [4, 4, 4, 3],
        [4, 4, 4, 3],
        [1, 0, 0, 0],
        [4, 4, 4, 3],
    ]
    assert [plan.epoch(step) for step in (0, 2, 3, 5, 6)] == [0, 0, 1, 1, 2]


def test_drop_last_leaves_the_short_minibatch_out() -> None:
    plan = _plan(31, 15, 4, drop_last=True)
    assert plan.steps_per_epoch == 2
    assert [sum(map(len, plan.microbatches(step))) for step in range(4)] == [15] * 4


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "drop_last", "steps"),
    [(30, 15, False, 2), (30, 15, True, 2), (31, 15, False, 3), (31, 15, True, 2), (3, 15, False, 1), (3, 15, True, 0)],
)
def test_steps_in_an_epoch(num_samples: int, batch_size: int, drop_last: bool, steps: int) -> None:
    assert steps_in_epoch(num_samples, batch_size, drop_last=drop_last) == steps


@pytest.mark.parametrize(
    ("num_microbatches", "num_workers", "runs"),
    [
        (1, 1, [(0, 1)]),
        (4, 1, [(0, 4)]),
        (4, 2, [(0, 2), (2, 4)]),
        (4, 3, [(0, 2), (2, 3), (3, 4)]),
        (4, 4, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        (7, 2, [(0, 4), (4, 7)]),
        (8, 3, [(0, 3), (3, 6), (6, 8)]),
        (2, 3, [(0, 1), (1, 2), (2, 2)]),
        (0, 2, [(0, 0), (0, 0)]),
    ],
)
def test_runs_of_known_deals(num_microbatches: int, num_workers: int, runs: list[tuple[int, int]]) -> None:
    assert [(run.start, run.stop) for run in deal_runs(num_microbatches, num_workers)] == runs


def test_the_samples_of_a_microbatch_do_not_depend_on_the_number_of_workers() -> None:
    plan = _plan(31, 15, 4)
    for step in range(6):
        microbatches = plan.microbatches(step)
        for num_workers in range(1, 5):
            dealt = [microbatches[index] for run in deal_runs(4, num_workers) for index in run]
            assert dealt == microbatches


def test_training_sets_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="training set is empty"):
        _plan(0, 4, 2)
    with pytest.raises(ConfigError, match="--drop-last leaves nothing: 3 training samples make no minibatch of 4"):
        _plan(3, 4, 2, drop_last=True)
