"""Sum along the tree, mean and Adam of a chunk in one pass over memory; see ``paramserver.fused``.

``fused_adam.c`` reads every contribution, parameter and average once. Its square root is torch's own: where torch was
built with MKL that is not the nearest number each time.
"""

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paramserver.fused import Pass, PassUnavailable, Sum, Work, load_pass, sum_of
from paramserver.reduction import Addition, Node, plan_additions

__all__ = ["AdamChunk", "FusedAdam", "fused_adam"]

_VML_MODE = 0x2 | 0x140000 | 0x100
"""High accuracy, numbers near zero kept, no error is looked for: what ATen asks of MKL."""


class AdamChunk(ctypes.Structure):
    """``struct chunk`` of fused_adam.c; see ``FusedAdam.chunk``."""

    _fields_ = (
        ("sum", Sum),
        ("old", ctypes.c_void_p),
        ("new", ctypes.c_void_p),
        ("average_old", ctypes.c_void_p),
        ("square_old", ctypes.c_void_p),
        ("average_new", ctypes.c_void_p),
        ("square_new", ctypes.c_void_p),
        ("root", ctypes.c_void_p),
        ("mode", ctypes.c_int64),
        ("weight_decay", ctypes.c_float),
        ("keep", ctypes.c_float),
        ("average_weight", ctypes.c_float),
        ("square_keep", ctypes.c_float),
        ("square_weight", ctypes.c_float),
        ("correction", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("step", ctypes.c_float),
        ("number", ctypes.c_float),
        ("count", ctypes.c_void_p),
    )
    rates: tuple[tuple[float, float], float]
    """Betas, and AdamW's weight decay."""

    def use_again(self, divisor: float, step: float, lr: float) -> None:
        """The same memory in another step."""
        (beta1, beta2), decay = self.rates
        self.sum.divisor = divisor
        self.keep = 1 - lr * decay
        self.correction = (1 - beta2**step) ** 0.5
        self.step = -lr / (1 - beta1**step)
        self.number = step


@dataclass(frozen=True, kw_only=True)
class FusedAdam:
    """The compiled pass."""

    function: Pass
    root: int | None
    """Address of torch's square root; None: the processor's."""

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
        averages: tuple[Tensor, Tensor],
        squares: tuple[Tensor, Tensor],
        count: Tensor,
        *,
        divisor: float,
        step: float,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        decoupled: bool,
        streaming: bool = True,
    ) -> AdamChunk:
        """What writes the next version of parameters and averages; they must outlive it.

        Args:
            pushed: addresses of the contributions, (n,) fp32 each.
            additions: that make their sum; see ``plan_additions``.
            parameters: (n,) fp32, read and written; both may be the same.
            averages: likewise, of the gradient.
            squares: likewise, of its square.
            count: fp32 without dimensions, where ``step`` is written.
            divisor: total weight, exact in fp32.
            step: number of this update, from 1.
            lr: learning rate.
            betas: see ``torch.optim.Adam``.
            eps: likewise.
            weight_decay: likewise.
            decoupled: whether the decay is AdamW's.
            streaming: see ``sum_of``.
        """
        beta1, beta2 = betas
        total = sum_of(parameters[0].numel(), pushed, additions, divisor, streaming=streaming)
        made = AdamChunk(
            sum=total,
            old=parameters[0].data_ptr(),
            new=parameters[1].data_ptr(),
            average_old=averages[0].data_ptr(),
            square_old=squares[0].data_ptr(),
            average_new=averages[1].data_ptr(),
            square_new=squares[1].data_ptr(),
            count=count.data_ptr(),
            root=self.root,
            mode=_VML_MODE,
            weight_decay=0.0 if decoupled else weight_decay,
            average_weight=1 - beta1,
            square_keep=beta2,
            square_weight=1 - beta2,
            eps=eps,
        )
        made.kept = total  # the copy of it in the structure has addresses alone
        made.rates = (betas, weight_decay if decoupled else 0.0)
        made.use_again(divisor, step, lr)
        return made


@lru_cache(maxsize=1)
def fused_adam() -> FusedAdam | None:
    """The pass of this process's machine, or None if there is no compiler or its bits are not torch's."""
    try:
        function = load_pass("fused_adam")
    except PassUnavailable:
        return None
    for root in (_root_of_mkl(), None):
        fused = FusedAdam(function=function, root=root)
        if _has_the_bits_of_torch(fused):
            return fused
    return None


def _root_of_mkl() -> int | None:
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(library.vmsSqrt, ctypes.c_void_p).value
    except (OSError, AttributeError):  # built without it
        return None


def _has_the_bits_of_torch(fused: FusedAdam) -> bool:
    """Whether it computes what torch computes, on random numbers of a length with a rest; square roots on many."""
    length, lr, betas, eps, divisor = 20_011, 0.01, (0.9, 0.999), 1e-8, torch.tensor(7.0)
    random = torch.Generator().manual_seed(0)
    pushed = [torch.randn(length, generator=random) for _ in range(3)]
    old, average = torch.randn(length, generator=random), torch.randn(length, generator=random)
    square = torch.rand(length, generator=random) * 10.0 ** torch.randint(-12, 3, (length,), generator=random)
    additions = plan_additions(Node(0, 3), (Node(0, 1), Node(1, 2), Node(2, 3)))
    total = pushed[0] + pushed[1] + pushed[2]
    for decay, decoupled, step in itertools.product((0.0, 0.1), (True, False), (1.0, 1000.0)):
        wanted = (old.clone(), average.clone(), square.clone())
        _step_by_torch(*wanted, torch.div(total, divisor), step, lr, betas, eps, decay, decoupled=decoupled)
        made, count = (torch.empty(length), torch.empty(length), torch.empty(length)), torch.zeros(())
        finite = fused(
            [vector.data_ptr() for vector in pushed],
            additions,
            (old, made[0]),
            (average, made[1]),
            (square, made[2]),
            count,
            divisor=float(divisor),
            step=step,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=decay,
            decoupled=decoupled,
        )
        if not (finite and count == step and all(map(torch.equal, made, wanted))):
            return False
    return True


def _step_by_torch(
    values: Tensor,
    average: Tensor,
    square: Tensor,
    gradient: Tensor,
    step: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    *,
    decoupled: bool,
) -> None:
    """The operations of torch/optim/adam.py ``_single_tensor_adam``; an optimizer itself would import the compiler."""
    beta1, beta2 = betas
    if decay and decoupled:
        values.mul_(1 - lr * decay)
    elif decay:
        gradient = gradient.add(values, alpha=decay)
    average.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    divisor = (square.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    values.addcdiv_(average, divisor, value=-lr / (1 - beta1**step))
