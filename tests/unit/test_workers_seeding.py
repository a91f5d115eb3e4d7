"""Random numbers depend on what they are drawn for, never on what was drawn before (E3)."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from models.errors import DataError
from models.task import Sample, Split
from tests.support.tiny_task import TinyTask
from workers.config import PlanConfig
from workers.minibatch import MinibatchPlan, deal_runs
from workers.samples import MicrobatchLoader
from workers.seeding import derive_seed, seeded


def _draw() -> tuple[Any, ...]:
    return (
        random.random(),
        float(np.random.rand()),
        torch.rand(3).tolist(),
        torch.nn.functional.dropout(torch.ones(9)),
    )


def _equal(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return one[:3] == other[:3] and torch.equal(one[3], other[3])


def _drawn(*parts: int | str) -> tuple[Any, ...]:
    with seeded(*parts):
        return _draw()


def test_the_same_parts_give_the_same_numbers_whatever_ran_before() -> None:
    wanted = _drawn("sample", 1, 2, 3)
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    _draw()
    assert _equal(_drawn("sample", 1, 2, 3), wanted)


@pytest.mark.parametrize(
    "parts", [("sample", 1, 2, 4), ("sample", 1, 3, 2), ("microbatch", 1, 2, 3), ("sample", 12, 3), ("sample", 1, 23)]
)
def test_other_parts_give_other_numbers(parts: tuple[int | str, ...]) -> None:
    wanted, got = _drawn("sample", 1, 2, 3), _drawn(*parts)
    assert all(one != other for one, other in zip(wanted[:3], got[:3], strict=True))


def test_a_derived_seed_is_the_same_on_every_machine() -> None:
    assert derive_seed("permutation", 0, 0) == 952797321878256791
    assert 0 <= derive_seed("x") < 1 << 63


@pytest.mark.parametrize("fails", [False, True])
def test_all_three_generators_go_on_as_if_the_block_had_not_been(fails: bool) -> None:
    def run(*, block: bool) -> list[tuple[Any, ...]]:
        torch.manual_seed(7)
        np.random.seed(7)
        random.seed(7)
        drawn = [_draw()]
        if block:
            try:
                with seeded("block"):
                    _draw()
                    if fails:
                        raise RuntimeError
            except RuntimeError:
                pass
        return [*drawn, _draw(), _draw()]

    for one, other in zip(run(block=True), run(block=False), strict=True):
        assert _equal(one, other)


def test_blocks_nest() -> None:
    with seeded("outer"):
        first = _draw()
        inner = _drawn("inner")
        second = _draw()
    with seeded("outer"):
        assert _equal(_draw(), first)
        assert _equal(_draw(), second)
    assert _equal(_drawn("inner"), inner)


def _begun(task: TinyTask, plan: MinibatchPlan, run: range, first_step: int = 0) -> MicrobatchLoader:
    loader = MicrobatchLoader(task, task.build_dataset("train"), plan)
    loader.begin(run, first_step)
    return loader


def _images(num_workers: int, first_step: int = 0) -> dict[tuple[int, int], torch.Tensor]:
    """Images by step and microbatch, as the loaders of so many workers give them."""
    task = TinyTask()
    plan = MinibatchPlan(PlanConfig(batch_size=15, microbatches=4, steps=5), 31)
    images = {}
    for run in deal_runs(4, num_workers):
        loader = _begun(task, plan, run, first_step)
        for step in range(first_step, 5):
            for index in run:
                if samples := plan.microbatches(step)[index]:
                    batch = loader.next()
                    assert batch.ids.tolist() == samples
                    images[step, index] = batch.images
        with pytest.raises(StopIteration):
            loader.next()
    return images


def test_samples_and_their_augmentation_are_the_same_for_any_number_of_workers_and_after_a_resume() -> None:
    wanted = _images(1)
    assert (4, 0) in wanted
    assert (2, 0) in wanted
    assert (2, 1) not in wanted
    for num_workers in (2, 3, 4):
        torch.rand(num_workers)
        images = _images(num_workers)
        assert images.keys() == wanted.keys()
        assert all(torch.equal(images[key], wanted[key]) for key in wanted)
    resumed = _images(2, first_step=3)
    assert all(torch.equal(resumed[key], wanted[key]) for key in resumed)


def test_the_same_sample_is_augmented_otherwise_in_the_next_epoch() -> None:
    task = TinyTask()
    plan = MinibatchPlan(PlanConfig(batch_size=1, microbatches=1, steps=2), 1)
    loader = _begun(task, plan, range(1))
    assert not torch.equal(loader.next().images, loader.next().images)


class _Unreadable(TinyTask):
    """Its second sample cannot be read."""

    def build_dataset(self, split: Split) -> Dataset[Sample]:
        dataset = super().build_dataset(split)

        class Broken(Dataset[Sample]):
            def __len__(self) -> int:
                return len(dataset)  # type: ignore[arg-type]

            def __getitem__(self, index: int) -> Sample:
                if index == 1:
                    raise DataError("image 1 is unreadable")
                return dataset[index]

        return Broken()


def test_what_preparing_raises_is_raised_when_the_microbatch_is_taken() -> None:
    plan = MinibatchPlan(PlanConfig(batch_size=1, microbatches=1, steps=2), 2)
    order = [plan.microbatches(step)[0] for step in range(2)]
    loader = _begun(_Unreadable(), plan, range(1))
    for samples in order:
        loader.prepare()
        loader.prepare()  # once is enough
        if samples == [1]:
            with pytest.raises(DataError, match="image 1"):
                loader.next()
        else:
            assert loader.next().ids.tolist() == samples
    loader.prepare()  # nothing is left, which is no error until it is wanted
