"""Stage 1, split: epoch permutation -> minibatch -> microbatches -> each worker's run. Pure functions of the plan."""

import itertools
from functools import lru_cache

import torch

from paramserver.errors import ConfigError
from workers.config import PlanConfig
from workers.seeding import derive_seed

__all__ = ["MinibatchPlan", "deal_runs", "steps_in_epoch"]


def steps_in_epoch(num_samples: int, batch_size: int, *, drop_last: bool) -> int:
    """Minibatches of one pass over the data; the last, short one counts unless it is dropped."""
    return num_samples // batch_size if drop_last else -(-num_samples // batch_size)


def deal_runs(num_microbatches: int, num_workers: int) -> list[range]:
    """One contiguous run of microbatches for each worker; the first ``M mod N`` get one more."""
    share, more = divmod(num_microbatches, num_workers)
    starts = [worker * share + min(worker, more) for worker in range(num_workers + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(starts)]


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_samples: int) -> list[int]:
    generator = torch.Generator().manual_seed(derive_seed("permutation", seed, epoch))
    order: list[int] = torch.randperm(num_samples, generator=generator).tolist()
    return order


class MinibatchPlan:
    """Which samples make up which microbatch of which step.

    Args:
        config: sizes and seed.
        num_samples: length of the training set.

    Raises:
        ConfigError: if the training set is empty, or shorter than a minibatch that may not be short.
    """

    def __init__(self, config: PlanConfig, num_samples: int) -> None:
        self.config = config
        self.num_samples = num_samples
        self.steps_per_epoch = steps_in_epoch(num_samples, config.batch_size, drop_last=config.drop_last)
        if num_samples < 1:
            raise ConfigError("the training set is empty")
        if self.steps_per_epoch < 1:
            raise ConfigError(
                f"--drop-last leaves nothing: {num_samples} training samples make no minibatch of {config.batch_size}"
            )

    def epoch(self, step: int) -> int:
        """Epoch of step ``step`` (both from 0)."""
        return step // self.steps_per_epoch

    def microbatches(self, step: int) -> list[list[int]]:
        """Sample indices of each microbatch; the first ``b mod M`` have one more, some may be empty."""
        size = self.config.batch_size
        start = step % self.steps_per_epoch * size
        minibatch = _permutation(self.config.seed, self.epoch(step), self.num_samples)[start : start + size]
        runs = deal_runs(len(minibatch), self.config.microbatches)
        return [minibatch[run.start : run.stop] for run in runs]
