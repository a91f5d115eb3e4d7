"""What a microbatch counted, read when it has come from the device that computes it."""

import torch
from torch import Tensor

from models.task import LossSum
from paramserver.messages import MicrobatchStats

__all__ = ["Counted"]


class Counted:
    """One microbatch's row. A GPU is not waited for until somebody reads it, which any thread may do.

    Args:
        microbatch: which one of the step.
        loss: its loss; None for a microbatch without samples.
        samples: how many it has.
    """

    def __init__(self, microbatch: int, loss: LossSum | None = None, samples: int = 0) -> None:
        self.microbatch = microbatch
        self.samples = samples
        self._row: MicrobatchStats | None = None
        if loss is None:
            self._row = MicrobatchStats(microbatch, 0.0, 0.0, samples)
        elif loss.total.is_cuda:
            self._numbers = [_to_host(value.detach().double()) for value in loss]
            self._there = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._there.record()
        else:
            self._row = MicrobatchStats(microbatch, float(loss.total.detach()), float(loss.weight), samples)

    @classmethod
    def of(cls, row: MicrobatchStats) -> "Counted":
        """A row that is known."""
        counted = cls(row.microbatch, None, row.samples)
        counted._row = row
        return counted

    def read(self) -> MicrobatchStats:
        """The row; waits for the device."""
        if self._row is None:
            self._there.synchronize()
            total, weight = map(float, self._numbers)
            self._row = MicrobatchStats(self.microbatch, total, weight, self.samples)
        return self._row


def _to_host(values: Tensor) -> Tensor:
    if not values.is_cuda:  # a task may count on the CPU
        return values
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
