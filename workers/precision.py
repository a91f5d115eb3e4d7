"""Forward and backward passes in 16 bits: autocast, and a loss scale that depends on nothing but the microbatch."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from models.task import LossSum
from workers.config import Precision

__all__ = ["autocast", "backward_scaled"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_FIRST_EXPONENT = 15
"""Of the scale of a mean loss that is tried first: a power of two, so that taking it off again is exact."""
_EXPONENT_STEP = 5


def autocast(device_type: str, precision: Precision) -> torch.autocast:
    """The context of a forward pass."""
    return torch.autocast(device_type, dtype=_DTYPES.get(precision, torch.bfloat16), enabled=precision != "fp32")


def backward_scaled(
    loss: LossSum, parameters: Sequence[nn.Parameter], seeded: Callable[[], AbstractContextManager[None]]
) -> None:
    """Backward of a loss whose gradients in fp16 would vanish or overflow without a scale.

    ``torch.amp.GradScaler`` learns its scale from the steps before, and skips a step to learn. Here the first scale,
    2^15 for the mean of the microbatch, is divided by 32 until every gradient is finite, and then taken off; so
    gradients depend on the microbatch alone, and any split of a minibatch gives the same ones (E1). If even the plain
    loss overflows, gradients are what they are, as ``--on-nan`` will see.

    Args:
        loss: of one microbatch.
        parameters: those whose gradients are accumulated, each once, as ``backward`` does.
        seeded: makes the context of each attempt, for what is drawn in it.
    """
    spread = math.ceil(math.log2(max(1.0, float(loss.weight))))
    exponent = _FIRST_EXPONENT - spread
    while True:
        scale = math.ldexp(1.0, exponent)
        with seeded():
            found = torch.autograd.grad(loss.total * scale, parameters, retain_graph=True, allow_unused=True)
        gradients = [gradient for gradient in found if gradient is not None]
        last = exponent <= -spread
        if last or _finite(gradients):
            break
        exponent -= _EXPONENT_STEP
    torch._foreach_div_(gradients, scale)
    used = [parameter for parameter, gradient in zip(parameters, found, strict=True) if gradient is not None]
    # On leaves this only accumulates, with all hooks that wait for it: those of the sums, and DDP's.
    torch.autograd.backward(used, gradients)


def _finite(gradients: list[Tensor]) -> bool:
    # The largest magnitude of each, since a sum of finite numbers may overflow.
    norms = torch._foreach_norm(gradients, float("inf"))
    return bool(torch.isfinite(torch.stack(list(norms))).all()) if gradients else True
