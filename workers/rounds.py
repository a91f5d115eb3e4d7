"""Rounds without a model's work: a backward that only hands out gradients, around which synchronisation is measured."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from paramserver.config import OptimizerConfig
from paramserver.fused_sgd import FusedSgd, fused_sgd
from paramserver.messages import MicrobatchStats
from paramserver.reduction import Node, plan_additions
from paramserver.server_memory import CHUNK
from workers.backend import Backend
from workers.counted import Counted
from workers.timing import PhaseTimer

__all__ = ["BlockModel", "Filling", "backend_round", "ddp_round", "fill_round", "limit_round", "plain_round", "timed"]


class BlockModel(nn.Module):
    """Parameters of ``megabytes`` MB (10^6 bytes) in blocks of at most 4 MB, for rounds of any size."""

    def __init__(self, megabytes: float) -> None:
        super().__init__()
        left = max(1, round(megabytes * 1e6 / 4))
        sizes = [1_000_000] * (left // 1_000_000) + [left % 1_000_000] * (left % 1_000_000 > 0)
        self.blocks = nn.ParameterList(torch.randn(size) for size in sizes)


class _HandOut(torch.autograd.Function):
    """Its backward gives each parameter the gradient that it was made with, without computing anything."""

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        # An alias of its own each time, which autograd takes over as it does a fresh gradient; the tensor itself it
        # would copy.
        return (None, *(gradient.detach() for gradient in ctx.gradients))


class Filling(nn.Module):
    """Wraps a model: ``forward`` gives a scalar whose backward fills the gradients of all trained parameters.

    Args:
        model: whose parameters get gradients.
        seed: of the gradients, random numbers of the parameters' shapes.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        super().__init__()
        self.model = model
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        generator = torch.Generator().manual_seed(seed)
        self._gradients = [
            torch.empty_like(parameter).copy_(1e-3 * torch.randn(parameter.shape, generator=generator)).detach()
            for parameter in self._trained
        ]

    def forward(self) -> Tensor:
        """A scalar zero."""
        result: Tensor = _HandOut.apply(self._gradients, *self._trained)
        return result


def timed(function: Callable[[], float | None], rounds: int) -> list[float]:
    """Milliseconds of each of ``rounds`` calls, after one that does not count; or those that the calls give."""
    found = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        own = function()
        found.append(1e3 * (time.perf_counter() - begin) if own is None else own)
    return found[1:]


def plain_round(filling: Filling) -> Callable[[], None]:
    """Backward alone: what is taken off the others."""

    def one() -> None:
        filling().backward()
        filling.zero_grad()

    return one


def fill_round(filling: Filling, backend: Backend, microbatch: int) -> Callable[[], None]:
    """Backward that leaves the gradients where a push takes them from, and no push."""

    def one() -> None:
        with backend.microbatch(microbatch, last=True):
            filling().backward()

    return one


def backend_round(
    filling: Filling, backend: Backend, microbatch: int, meet: Callable[[], float]
) -> Callable[[], float]:
    """A worker's step; gives the milliseconds from its push until the next version is pulled.

    Pushing begins when all workers have their gradients where a push takes them from, and nobody goes on to the next
    backward before all have pulled: ``meet`` returns at one instant for all, once all have come, and gives it.
    """
    timer = PhaseTimer()
    counted = Counted.of(MicrobatchStats(microbatch, 0.0, 1.0, 1))
    backend.pull(timer)

    def one() -> float:
        with backend.microbatch(microbatch, last=True):
            loss = filling()
            backend.forwarded(counted)
            loss.backward()
        begin = meet()
        backend.contribute(counted, timer)
        backend.push(timer)
        backend.wait(timer)
        backend.pull(timer)
        end = time.perf_counter()
        meet()
        return 1e3 * (end - begin)

    return one


def ddp_round(filling: Filling, wrapped: nn.Module, config: OptimizerConfig) -> Callable[[], None]:
    """Backward under DistributedDataParallel, which sums in it, then the same SGD on every rank."""
    optimizer = torch.optim.SGD(
        filling.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=True,  # the fastest there is: a baseline is tuned
    )

    def one() -> None:
        wrapped().backward()
        optimizer.step()
        optimizer.zero_grad()

    return one


def limit_round(length: int, contributions: int, config: OptimizerConfig) -> Callable[[], None]:
    """What memory allows one thread: sum and SGD in one pass over plain buffers, state in place.

    Where there is a compiled pass it is that, else torch's operations chunk by chunk.
    """
    values, momentum = torch.randn(length), torch.zeros(length)
    pushed = [torch.randn(length) for _ in range(contributions)]
    if (fused := fused_sgd()) is not None:
        return partial(_fused_pass, fused, values, momentum, pushed, config)
    scratch = [torch.empty(CHUNK) for _ in range(contributions)]
    weight = torch.tensor(float(contributions))

    def one() -> None:
        for lo in range(0, length, CHUNK):
            hi = min(lo + CHUNK, length)
            level = [vector[lo:hi] for vector in pushed]
            while len(level) > 1:
                pairs = zip(level[::2], level[1::2], scratch, strict=False)
                odd = level[-1:] if len(level) % 2 else []
                level = [torch.add(left, right, out=out[: hi - lo]) for left, right, out in pairs] + odd
            mean = torch.div(level[0], weight, out=scratch[0][: hi - lo])
            if config.weight_decay:
                mean.add_(values[lo:hi], alpha=config.weight_decay)
            momentum[lo:hi].mul_(config.momentum).add_(mean)
            values[lo:hi].add_(momentum[lo:hi], alpha=-config.lr)

    return one


def _fused_pass(
    fused: FusedSgd, values: Tensor, momentum: Tensor, pushed: Sequence[Tensor], config: OptimizerConfig
) -> None:
    leaves = tuple(Node(index, index + 1) for index in range(len(pushed)))
    fused(
        [vector.data_ptr() for vector in pushed],
        plan_additions(Node(0, len(pushed)), leaves),
        (values, values),
        (momentum, momentum),
        divisor=float(len(pushed)),
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        nesterov=config.nesterov,
        streaming=False,
    )
