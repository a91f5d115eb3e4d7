"""What one thread of a server works with: reused memory, so that a chunk stays in cache, and the time it was busy."""

import torch
from torch import Tensor

__all__ = ["Scratch"]


class Scratch:
    """A stack of vectors of one size; what ``take`` gave out is free again after ``reset``.

    Args:
        size: elements of the largest vector asked for.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._vectors: list[Tensor] = []
        self._used = 0
        self.busy = {"aggregate": 0.0, "update": 0.0, "commit": 0.0}
        """Seconds by stage since ``take_busy``."""

    def take_busy(self) -> dict[str, float]:
        """Seconds by stage since the last call."""
        taken = dict(self.busy)
        self.busy = dict.fromkeys(taken, 0.0)
        return taken

    def reset(self) -> None:
        """Everything that was given out may be overwritten."""
        self._used = 0

    def take(self, numel: int) -> Tensor:
        """A (numel,) fp32 vector with undefined content."""
        if self._used == len(self._vectors):
            self._vectors.append(torch.empty(self._size))
        self._used += 1
        return self._vectors[self._used - 1][:numel]

    def add(self, left: Tensor, right: Tensor) -> Tensor:
        """``left + right`` without changing a vector that is not this object's own."""
        for operand in (left, right):
            if self._owns(operand):
                return torch.add(left, right, out=operand)
        return torch.add(left, right, out=self.take(left.shape[0]))

    def _owns(self, vector: Tensor) -> bool:
        return any(vector.data_ptr() == own.data_ptr() for own in self._vectors[: self._used])
