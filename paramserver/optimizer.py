"""One slice's optimizer, double-buffered: reads version ``t``, writes version ``t + 1``, never touches ``t``."""

import ctypes
from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from paramserver.config import OptimizerConfig
from paramserver.fused import Pass
from paramserver.fused_adam import AdamChunk, fused_adam
from paramserver.fused_sgd import SgdChunk, fused_sgd
from paramserver.reduction import Addition
from paramserver.server_memory import ChunkMemory

__all__ = ["BufferMean", "InOnePass", "SliceOptimizer", "build_slice_optimizer"]

C = TypeVar("C", bound=ctypes.Structure)


class InOnePass(Protocol):
    """What can read contributions and write a version in one pass."""

    @property
    def one_pass(self) -> Pass | None:
        """Does what ``in_one_pass`` describes; None if there is no such pass."""

    def may_plan(self, version: int) -> bool:
        """Whether ``in_one_pass`` writes nothing before its chunk is worked on, so that it may be called early."""

    def in_one_pass(
        self, version: int, pushed: tuple[int, ...], additions: tuple[Addition, ...], divisor: float, lr: float
    ) -> ctypes.Structure:
        """A chunk that does as ``step_sum`` with the sum of contributions, to the bit; valid until the next one.

        If the sum turns out not to be finite everywhere, what was written counts for nothing.

        Args:
            version: the committed one, which is read.
            pushed: addresses of the contributions, (n,) fp32 each.
            additions: that make their sum.
            divisor: of the sum.
            lr: learning rate, before this slice's factor.
        """


class SliceOptimizer(InOnePass, Protocol):
    """An element-wise optimizer of one slice with two versions of the parameters and of its state."""

    def step(self, version: int, gradient: Tensor, lr: float) -> None:
        """Write version ``version + 1`` from ``version`` and the mean gradient (n,) fp32, which is overwritten."""

    def step_sum(self, version: int, total: Tensor, divisor: Tensor, lr: float, quotient: Tensor) -> None:
        """As ``step`` with ``total / divisor``, to the bit.

        ``total`` (n,) is only read, unless it is ``quotient`` itself: (n,) memory that may be written.
        """

    def skip(self, version: int) -> None:
        """Write version ``version + 1`` as a copy of ``version``."""

    def state(self, version: int) -> dict[str, Tensor]:
        """State of ``version`` by torch.optim's names: (n,) vectors, and scalars such as Adam's step; not copied."""

    def load_state(self, version: int, state: Mapping[str, Tensor]) -> None:
        """Make copies of ``state`` the state of ``version``."""


def build_slice_optimizer(
    values: tuple[Tensor, Tensor], memory: ChunkMemory, config: OptimizerConfig, lr_factor: float = 1.0
) -> SliceOptimizer:
    """The optimizer of one slice.

    Args:
        values: the two (n,) fp32 vectors of the slice; version ``v`` lies in ``values[v % 2]``.
        memory: where its state lies; goes on with what stands there.
        config: the optimizer.
        lr_factor: factor on the learning rate of this slice's group.
    """
    cls = _Sgd if config.name == "sgd" else _Adam
    return cls(values, memory, config, lr_factor)


class _Chunks(Generic[C]):
    """The chunk that was made last for each half that is read: workers push from the same places in every step."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[object, C]] = {}

    def of(self, half: int, about: object, make: Callable[[], C]) -> C:
        """The last one of ``half`` if it was made for ``about``, whatever decides which memory it names, or a new one.

        What changes from step to step is to be set with ``use_again``.
        """
        before, chunk = self._made.get(half, (None, None))
        if chunk is None or before != about:
            chunk = make()
            self._made[half] = (about, chunk)
        return chunk


class BufferMean:
    """Buffers of one slice: the mean of what microbatches changed is added, which is SGD with a learning rate of -1.

    Args:
        values: the two (n,) fp32 vectors of the slice; version ``v`` lies in ``values[v % 2]``.
    """

    def __init__(self, values: tuple[Tensor, Tensor]) -> None:
        self._values = values
        self._fused = fused_sgd()
        self.one_pass: Pass | None = self._fused.function if self._fused else None
        self._chunks = _Chunks[SgdChunk]()

    def step_sum(self, version: int, total: Tensor, divisor: Tensor, quotient: Tensor) -> None:
        """Write version ``version + 1``; see ``SliceOptimizer.step_sum``."""
        torch.add(self._values[version % 2], torch.div(total, divisor, out=quotient), out=self._values[1 - version % 2])

    def may_plan(self, version: int) -> bool:
        """See ``InOnePass.may_plan``."""
        return True

    def in_one_pass(
        self, version: int, pushed: tuple[int, ...], additions: tuple[Addition, ...], divisor: float, lr: float
    ) -> ctypes.Structure:
        """See ``InOnePass.in_one_pass``; what is not finite is written as it is."""
        source, fused = version % 2, self._fused
        assert fused is not None

        def make() -> SgdChunk:
            return fused.chunk(
                pushed,
                additions,
                (self._values[source], self._values[1 - source]),
                (None, None),
                divisor=divisor,
                lr=-1.0,
                weight_decay=0.0,
                momentum=0.0,
                nesterov=False,
            )

        chunk = self._chunks.of(source, (pushed, additions), make)
        chunk.use_again(divisor, -1.0)
        return chunk


class _Sgd:
    """``torch.optim.SGD`` to the bit (``foreach=False``), from one version into the other without copying first.

    The formulas are those of torch/optim/sgd.py ``_single_tensor_sgd``, with ``out=`` in place of in-place.
    """

    def __init__(
        self, values: tuple[Tensor, Tensor], memory: ChunkMemory, config: OptimizerConfig, lr_factor: float
    ) -> None:
        self._values = values
        self._config = config
        self._lr_factor = lr_factor
        first, second = memory.vectors
        self._momentum = (first["momentum_buffer"], second["momentum_buffer"]) if config.momentum else None
        self._updates = memory.updates
        self._has_momentum = [bool(count) for count in memory.updates]
        self._fused = fused_sgd()
        self.one_pass: Pass | None = self._fused.function if self._fused else None
        self._chunks = _Chunks[SgdChunk]()

    def step(self, version: int, gradient: Tensor, lr: float) -> None:
        """See ``SliceOptimizer.step``."""
        source, target = version % 2, (version + 1) % 2
        config, old = self._config, self._values[source]
        direction = gradient
        if config.weight_decay:
            gradient.add_(old, alpha=config.weight_decay)
        if self._momentum is not None:
            direction = self._momentum[target]
            if self._has_momentum[source]:
                torch.mul(self._momentum[source], config.momentum, out=direction).add_(gradient)
            else:
                direction.copy_(gradient)
            self._note_momentum(target, known=True)
            if config.nesterov:
                direction = gradient.add_(direction, alpha=config.momentum)
        self._move(version, direction, lr)

    def step_sum(self, version: int, total: Tensor, divisor: Tensor, lr: float, quotient: Tensor) -> None:
        """See ``SliceOptimizer.step_sum``: one pass less where the mean gradient is only added to the momentum."""
        source, target = version % 2, (version + 1) % 2
        only_added = self._has_momentum[source] and not self._config.weight_decay and not self._config.nesterov
        if self._momentum is None or not only_added:
            self.step(version, torch.div(total, divisor, out=quotient), lr)
            return
        direction = torch.mul(self._momentum[source], self._config.momentum, out=self._momentum[target])
        direction.addcdiv_(total, divisor)  # rounds the quotient, then the sum
        self._note_momentum(target, known=True)
        self._move(version, direction, lr)

    def may_plan(self, version: int) -> bool:
        """See ``InOnePass.may_plan``: what is remembered of the momentum changes in a run's first steps alone."""
        return self._momentum is None or self._has_momentum[(version + 1) % 2]

    def in_one_pass(
        self, version: int, pushed: tuple[int, ...], additions: tuple[Addition, ...], divisor: float, lr: float
    ) -> ctypes.Structure:
        """See ``InOnePass.in_one_pass``."""
        source, target = version % 2, (version + 1) % 2
        momentum, known, fused = self._momentum, self._has_momentum[source], self._fused
        assert fused is not None

        def make() -> SgdChunk:
            return fused.chunk(
                pushed,
                additions,
                (self._values[source], self._values[target]),
                (None, None) if momentum is None else (momentum[source] if known else None, momentum[target]),
                divisor=divisor,
                lr=lr * self._lr_factor,
                weight_decay=self._config.weight_decay,
                momentum=self._config.momentum,
                nesterov=self._config.nesterov,
            )

        chunk = self._chunks.of(source, (pushed, additions, known), make)
        chunk.use_again(divisor, lr * self._lr_factor)
        if momentum is not None:
            self._note_momentum(target, known=True)
        return chunk

    def _move(self, version: int, direction: Tensor, lr: float) -> None:
        old, new = self._values[version % 2], self._values[(version + 1) % 2]
        # One fused multiply-add: p - lr * m in two operations would give other bits.
        torch.add(old, direction, alpha=-lr * self._lr_factor, out=new)

    def _note_momentum(self, half: int, *, known: bool) -> None:
        if self._has_momentum[half] != known:
            self._has_momentum[half] = known
            self._updates[half].fill_(known)

    def skip(self, version: int) -> None:
        """See ``SliceOptimizer.skip``."""
        source, target = version % 2, (version + 1) % 2
        self._values[target].copy_(self._values[source])
        self._note_momentum(target, known=self._has_momentum[source])
        if self._momentum is not None and self._has_momentum[source]:
            self._momentum[target].copy_(self._momentum[source])

    def state(self, version: int) -> dict[str, Tensor]:
        """See ``SliceOptimizer.state``."""
        known = self._momentum is not None and self._has_momentum[version % 2]
        return {"momentum_buffer": self._momentum[version % 2]} if known and self._momentum else {}

    def load_state(self, version: int, state: Mapping[str, Tensor]) -> None:
        """See ``SliceOptimizer.load_state``."""
        known = self._momentum is not None and "momentum_buffer" in state
        self._note_momentum(version % 2, known=known)
        if self._momentum is not None and known:
            self._momentum[version % 2].copy_(state["momentum_buffer"])


class _Adam:
    """``torch.optim.Adam`` or ``AdamW``: in one pass, or on a copy of version ``t`` that is stepped in place."""

    def __init__(
        self, values: tuple[Tensor, Tensor], memory: ChunkMemory, config: OptimizerConfig, lr_factor: float
    ) -> None:
        self._values = values
        self._config = config
        self._lr_factor = lr_factor
        # From 0.5 on torch rounds the other average another way (ATen's lerp).
        self._fused = fused_adam() if config.betas[0] > 0.5 else None
        self.one_pass: Pass | None = self._fused.function if self._fused else None
        self._chunks = _Chunks[AdamChunk]()
        self._states = tuple(
            {"step": count, **vectors} for count, vectors in zip(memory.updates, memory.vectors, strict=True)
        )
        self._optimizers = (_build(config, values[0]), _build(config, values[1]))
        for optimizer, value, state in zip(self._optimizers, values, self._states, strict=True):
            optimizer.state[value] = state  # zeros at step 0, as torch would make at the first step

    def step(self, version: int, gradient: Tensor, lr: float) -> None:
        """See ``SliceOptimizer.step``."""
        self.skip(version)
        target = (version + 1) % 2
        optimizer, values = self._optimizers[target], self._values[target]
        optimizer.param_groups[0]["lr"] = lr * self._lr_factor
        values.grad = gradient
        optimizer.step()
        values.grad = None

    def step_sum(self, version: int, total: Tensor, divisor: Tensor, lr: float, quotient: Tensor) -> None:
        """See ``SliceOptimizer.step_sum``."""
        self.step(version, torch.div(total, divisor, out=quotient), lr)

    def may_plan(self, version: int) -> bool:
        """See ``InOnePass.may_plan``."""
        return True

    def in_one_pass(
        self, version: int, pushed: tuple[int, ...], additions: tuple[Addition, ...], divisor: float, lr: float
    ) -> ctypes.Structure:
        """See ``InOnePass.in_one_pass``."""
        source, target = version % 2, (version + 1) % 2
        before, after = self._states[source], self._states[target]
        step, fused = float(before["step"]) + 1, self._fused
        assert fused is not None

        def make() -> AdamChunk:
            return fused.chunk(
                pushed,
                additions,
                (self._values[source], self._values[target]),
                (before["exp_avg"], after["exp_avg"]),
                (before["exp_avg_sq"], after["exp_avg_sq"]),
                after["step"],
                divisor=divisor,
                step=step,
                lr=lr * self._lr_factor,
                betas=self._config.betas,
                eps=self._config.eps,
                weight_decay=self._config.weight_decay,
                decoupled=self._config.name == "adamw",
            )

        chunk = self._chunks.of(source, (pushed, additions), make)
        chunk.use_again(divisor, step, lr * self._lr_factor)
        return chunk

    def skip(self, version: int) -> None:
        """See ``SliceOptimizer.skip``."""
        source, target = version % 2, (version + 1) % 2
        self._values[target].copy_(self._values[source])
        for name, value in self._states[source].items():
            self._states[target][name].copy_(value)

    def state(self, version: int) -> dict[str, Tensor]:
        """See ``SliceOptimizer.state``."""
        state = self._states[version % 2]
        return dict(state) if state["step"] else {}

    def load_state(self, version: int, state: Mapping[str, Tensor]) -> None:
        """See ``SliceOptimizer.load_state``."""
        for name, own in self._states[version % 2].items():
            own.copy_(state[name]) if state else own.zero_()


def _build(config: OptimizerConfig, values: Tensor) -> torch.optim.Optimizer:
    cls = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    # The kernel is named: fused and foreach kernels are chosen by device and size otherwise, and give other bits.
    return cls(
        [values],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        foreach=False,
        fused=False,
    )
