"""Sum along the tree, mean and SGD of a chunk in one pass over memory; see ``paramserver.fused``.

``fused_sgd.c`` reads every contribution, parameter and momentum once.
"""

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from paramserver.fused import Pass, PassUnavailable, Sum, Work, load_pass, sum_of
from paramserver.reduction import Addition, Node, plan_additions

__all__ = ["FusedSgd", "SgdChunk", "fused_sgd"]


class SgdChunk(ctypes.Structure):
    """``struct chunk`` of fused_sgd.c; see ``FusedSgd.chunk``."""

    _fields_ = (
        ("sum", Sum),
        ("old", ctypes.c_void_p),
        ("new", ctypes.c_void_p),
        ("momentum_old", ctypes.c_void_p),
        ("momentum_new", ctypes.c_void_p),
        ("weight_decay", ctypes.c_float),
        ("momentum", ctypes.c_float),
        ("step", ctypes.c_float),
        ("nesterov", ctypes.c_int32),
    )

    def use_again(self, divisor: float, lr: float) -> None:
        """The same memory in another step."""
        self.sum.divisor = divisor
        self.step = -lr


@dataclass(frozen=True, kw_only=True)
class FusedSgd:
    """The compiled pass."""

    function: Pass

    def __call__(self, *memory: Any, **settings: Any) -> bool:
        """Do what ``chunk`` describes; False if the sum is not finite somewhere."""
        work = Work(self.function, [self.chunk(*memory, **settings)])
        work()
        return work.finite

    def chunk(
        self,
        pushed: Sequence[int],
        additions: tuple[Addition, ...],
        parameters: tuple[Tensor, Tensor],
        momenta: tuple[Tensor | None, Tensor | None],
        *,
        divisor: float,
        lr: float,
        weight_decay: float,
        momentum: float,
        nesterov: bool,
        streaming: bool = True,
    ) -> SgdChunk:
        """What writes the next version of parameters and momentum; they must outlive it.

        Args:
            pushed: addresses of the contributions, (n,) fp32 each.
            additions: that make their sum; see ``plan_additions``.
            parameters: (n,) fp32, read and written; both may be the same.
            momenta: likewise; None where there is none yet, or none at all.
            divisor: total weight, exact in fp32.
            lr: learning rate.
            weight_decay: see ``torch.optim.SGD``.
            momentum: likewise.
            nesterov: likewise.
            streaming: whether what is written goes past the caches: for what the next one to read is far away.
        """
        old, new = parameters
        old_momentum, new_momentum = (None if m is None else m.data_ptr() for m in momenta)
        total = sum_of(old.numel(), pushed, additions, divisor, streaming=streaming)
        made = SgdChunk(
            total, old.data_ptr(), new.data_ptr(), old_momentum, new_momentum, weight_decay, momentum, -lr, nesterov
        )
        made.kept = total  # the copy of it in the structure has addresses alone
        return made


@lru_cache(maxsize=1)
def fused_sgd() -> FusedSgd | None:
    """The pass of this process's machine, or None if there is no compiler or its bits are not torch's."""
    try:
        fused = FusedSgd(function=load_pass("fused_sgd"))
    except PassUnavailable:
        return None
    return fused if _has_the_bits_of_torch(fused) else None


def _has_the_bits_of_torch(fused: FusedSgd) -> bool:
    """Whether it computes what torch computes, on random numbers of a length with a rest, in all its ways."""
    length, lr, momentum, divisor = 333, 0.1, 0.9, torch.tensor(7.0)
    random = torch.Generator().manual_seed(0)
    pushed = [torch.randn(length, generator=random) for _ in range(3)]
    old, before = torch.randn(length, generator=random), torch.randn(length, generator=random)
    additions = plan_additions(Node(0, 3), (Node(0, 1), Node(1, 2), Node(2, 3)))
    total = pushed[0] + pushed[1] + pushed[2]
    for decay, known, nesterov, remembers in itertools.product((0.0, 0.1), (True, False), (True, False), (True, False)):
        gradient = torch.div(total, divisor)
        if decay:
            gradient.add_(old, alpha=decay)
        direction = torch.mul(before, momentum).add_(gradient) if known else gradient.clone()
        moved = gradient.add(direction, alpha=momentum) if nesterov else direction
        wanted = torch.add(old, moved if remembers else gradient, alpha=-lr)
        new, after = torch.empty(length), torch.empty(length)
        finite = fused(
            [vector.data_ptr() for vector in pushed],
            additions,
            (old, new),
            (before if known and remembers else None, after if remembers else None),
            divisor=float(divisor),
            lr=lr,
            weight_decay=decay,
            momentum=momentum,
            nesterov=nesterov,
        )
        if not (finite and torch.equal(new, wanted) and (not remembers or torch.equal(after, direction))):
            return False
    return True
