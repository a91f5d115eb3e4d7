"""Samples of a worker's microbatches, in the order in which it needs them, each drawn under its own seed."""

from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, cast

from torch.utils.data import DataLoader, Dataset, Sampler

from models.task import Batch, Sample, Task
from workers.minibatch import MinibatchPlan
from workers.seeding import seeded

__all__ = ["MicrobatchLoader"]


class _SeededDataset(Dataset[Sample]):
    """Takes ``(epoch, index)``, since a data set of its own never learns the epoch, and seeds by both."""

    def __init__(self, dataset: Dataset[Sample], seed: int) -> None:
        self._dataset = dataset
        self._seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        with seeded("sample", self._seed, epoch, index):
            return self._dataset[index]


class _RunSampler(Sampler[list[tuple[int, int]]]):
    """Keys of each non-empty microbatch of a run, step by step."""

    def __init__(self, plan: MinibatchPlan, run: range, first_step: int) -> None:
        self._plan = plan
        self._run = run
        self._first_step = first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self._first_step, self._plan.config.steps):
            epoch = self._plan.epoch(step)
            microbatches = self._plan.microbatches(step)
            for index in self._run:
                if microbatches[index]:
                    yield [(epoch, sample) for sample in microbatches[index]]


class MicrobatchLoader:
    """Iterates over the batches of one run of microbatches from ``first_step`` on.

    Args:
        task: collates.
        dataset: the training set.
        plan: which samples come when.
        run: microbatches of this worker.
        first_step: step to begin with, from 0.
        pin_memory: whether batches go to a GPU.
    """

    def __init__(
        self,
        task: Task,
        dataset: Dataset[Sample],
        plan: MinibatchPlan,
        run: range,
        first_step: int,
        *,
        pin_memory: bool = False,
    ) -> None:
        loader: DataLoader[Any] = DataLoader(
            _SeededDataset(dataset, plan.config.seed),
            batch_sampler=_RunSampler(plan, run, first_step),
            collate_fn=task.collate,
            pin_memory=pin_memory,
        )
        self._batches = iter(loader)
        self._prepared: Future[Batch] | None = None

    def next(self) -> Batch:
        """The next non-empty microbatch."""
        self.prepare()
        assert self._prepared is not None
        prepared, self._prepared = self._prepared, None
        return prepared.result()

    def prepare(self) -> None:
        """Draw the next microbatch now, if there is one left; what that raises is raised by ``next``."""
        if self._prepared is None:
            self._prepared = Future()
            try:
                self._prepared.set_result(cast(Batch, next(self._batches)))
            except Exception as error:
                self._prepared.set_exception(error)
