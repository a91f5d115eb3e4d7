"""What one thread of a server works with: reused memory, so that a chunk stays in cache, and the time it was busy."""

import torch
from torch import Tensor

from paramserver.reduction import Node, TreeSum

__all__ = ["Scratch"]


class Scratch:
    """Vectors of one size that are used again for every chunk.

    Args:
        size: elements of the largest vector asked for.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._vectors: list[Tensor] = []
        self.busy = {"aggregate": 0.0, "update": 0.0, "commit": 0.0}
        """Seconds by stage since ``take_busy``."""

    def take_busy(self) -> dict[str, float]:
        """Seconds by stage since the last call."""
        taken = dict(self.busy)
        self.busy = dict.fromkeys(taken, 0.0)
        return taken

    def take(self, index: int, numel: int) -> Tensor:
        """Vector ``index``, (numel,) fp32; its content is what was left there."""
        while index >= len(self._vectors):
            self._vectors.append(torch.empty(self._size))
        vector = self._vectors[index]
        return vector if numel == self._size else vector[:numel]

    def sum(
        self, held: TreeSum[Tensor], lo: int, hi: int, node: Node | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Elements ``lo`` to ``hi`` of the sum over ``node`` (None: the root) of what is held.

        It stands in ``out``, or in this object's memory if that is None; where nothing has to be added, it is the held
        vector's own.
        """
        vectors, additions = held.plan(node)
        registers = dict(enumerate(vector[lo:hi] for vector in vectors))
        target = 0
        for step, (left, right, target) in enumerate(additions, start=1):
            whole = out is not None and step == len(additions)
            into = out if whole else self.take(target - len(vectors), hi - lo)
            registers[target] = torch.add(registers[left], registers[right], out=into)
        return registers[target]
