"""One slice as its server holds it: contributions to the open step, two versions of values and optimizer state."""

import ctypes
import math
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from paramserver.config import OptimizerConfig
from paramserver.errors import NonFiniteGradient
from paramserver.fused import DIVISOR_OFFSET, Pass, Work
from paramserver.optimizer import BufferMean, InOnePass, build_slice_optimizer
from paramserver.partition import BUFFERS, ELEMENT_BYTES, Key, Slice
from paramserver.reduction import Addition, Node, TreeSum
from paramserver.round_plan import Divisor, PlannedChunk
from paramserver.scratch import Scratch
from paramserver.server_memory import CHUNK, ServerMemory
from paramserver.state import SliceSnapshot

__all__ = ["HeldSlice", "non_finite_gradient"]


class HeldSlice:
    """Sum, update and snapshot of one slice; different slices may be updated by different threads at once.

    Args:
        piece: which slice.
        keys: the keys in it with their range inside the slice.
        memory: where its versions lie; goes on with what stands there.
        config: the optimizer.
        contributions: to the open step.
    """

    def __init__(
        self,
        piece: Slice,
        keys: tuple[tuple[Key, int, int], ...],
        memory: ServerMemory,
        config: OptimizerConfig,
        contributions: TreeSum[Tensor],
    ) -> None:
        self.piece = piece
        self._is_buffers = piece.group == BUFFERS
        first, second = memory.vectors
        self.values = values = (first[piece.start : piece.stop], second[piece.start : piece.stop])
        """The two (n,) fp32 vectors; version ``v`` lies in ``values[v % 2]``."""
        self._keys = keys
        self._ranges = [(lo, min(lo + CHUNK, piece.numel)) for lo in range(0, piece.numel, CHUNK)]
        self._chunks = (torch.split(values[0], CHUNK), torch.split(values[1], CHUNK))
        factor = config.lr_factor(keys[0][0].name) if keys else 1.0
        self._optimizers = [
            build_slice_optimizer(pair, chunk, config, factor)
            for pair, chunk in zip(zip(*self._chunks, strict=True), memory.chunks(piece), strict=False)
        ]
        self._buffers = [BufferMean(pair) for pair in zip(*self._chunks, strict=True)] if self._is_buffers else []
        self._in_one_pass: Sequence[InOnePass] = self._buffers or self._optimizers
        self.parts = range(len(self._ranges))
        """Chunks, which may be updated by different threads."""
        self._done: set[int] = set()
        self._sum = contributions
        self._planned: tuple[Mapping[Node, Tensor], tuple[int, ...], tuple[Addition, ...]] = ({}, (), ())
        """Of which contributions addresses and additions were found last: workers push from the same few vectors."""
        self._mean: Tensor | None = None

    def load(self, version: int, values: Tensor, state: Mapping[str, Tensor]) -> None:
        """Make copies of ``values`` and of the optimizer's ``state``, (n,) vectors and scalars by name, ``version``."""
        for own in self.values:
            own.copy_(values)
        for (lo, hi), optimizer in zip(self._ranges, self._optimizers, strict=False):
            optimizer.load_state(
                version, {name: value[lo:hi] if value.ndim else value for name, value in state.items()}
            )

    # -- the open step -----------------------------------------------------------------------------------------------

    def open_step(self) -> None:
        """The contributions are those of the next step from now on."""
        self._mean = None
        self._done.clear()

    @property
    def updated(self) -> bool:
        """Whether the open step's version stands in the other half."""
        return len(self._done) == len(self.parts)

    def squared_norms(self, divisor: Tensor, scratch: Scratch) -> list[tuple[int, int, str, float]]:
        """Rows of a ``Report``; keeps the mean gradient for ``update``."""
        begin = time.perf_counter()
        mean = self._mean = torch.empty(self.piece.numel)
        for lo, hi in self._ranges:
            torch.div(scratch.sum(self._sum, lo, hi), divisor, out=mean[lo:hi])
        rows = [
            (key.offset, self.piece.start + first, key.name, _squared_norm(mean[first:last]))
            for key, first, last in self._keys
        ]
        scratch.busy["aggregate"] += time.perf_counter() - begin
        return rows

    def update(
        self, part: int, version: int, divisor: Tensor, lr: float, scratch: Scratch, scale: float | None = None
    ) -> None:
        """Write version ``version + 1`` of one of ``parts``, while it is in cache.

        Args:
            part: which.
            version: the committed one, which is read.
            divisor: total weight, or samples for buffers, as a tensor without dimensions.
            lr: learning rate of this step.
            scratch: of the calling thread.
            scale: the vote's factor on the mean, which ``squared_norms`` keeps; None where there was no vote.

        Raises:
            NonFiniteGradient: naming the key, where there was no vote.
        """
        begin = time.perf_counter()
        if (found := self.in_one_pass(part, version, float(divisor), lr)) is not None:
            function, chunk = found
            work = Work(function, [chunk])
            work()
            self.end_pass(part, version, scratch, finite=work.finite)
            scratch.busy["update"] += time.perf_counter() - begin
            return
        lo, hi = self._ranges[part]
        total = scratch.sum(self._sum, lo, hi) if self._mean is None else None
        summed = time.perf_counter()
        if total is None:
            assert self._mean is not None
            mean = self._mean[lo:hi]
            if scale is not None and scale != 1.0:
                mean.mul_(scale)
            self._optimizers[part].step(version, mean, lr)
        elif self._is_buffers:
            self._buffers[part].step_sum(version, total, divisor, scratch.take(0, hi - lo))
        else:
            self._refuse_non_finite(total, lo, hi, version + 1)
            self._optimizers[part].step_sum(version, total, divisor, lr, scratch.take(0, hi - lo))
        scratch.busy["aggregate"] += summed - begin
        scratch.busy["update"] += time.perf_counter() - summed
        self._done.add(part)

    def in_one_pass(self, part: int, version: int, divisor: float, lr: float) -> tuple[Pass, ctypes.Structure] | None:
        """A pass and its chunk, for ``Work``: they do as ``update``, sum and optimizer at once; ``end_pass`` follows.

        None if there is no such pass.
        """
        writer = self._in_one_pass[part]
        if self._mean is not None or writer.one_pass is None:
            return None
        known, pushed, additions = self._planned
        if not self._sum.holds(known):
            known = self._sum.contributions
            vectors, additions = self._sum.plan()
            # Without addresses there is no pass for them.
            contiguous = all(vector.is_contiguous() for vector in vectors)
            pushed = tuple(vector.data_ptr() for vector in vectors) if contiguous else ()
            self._planned = known, pushed, additions
        if not pushed:
            return None
        if part:
            pushed = tuple(address + ELEMENT_BYTES * self._ranges[part][0] for address in pushed)
        return writer.one_pass, writer.in_one_pass(version, pushed, additions, divisor, lr)

    def plan(self, contributions: Mapping[Node, Tensor], version: int, lr: float) -> list[PlannedChunk] | None:
        """What ``in_one_pass`` will give for all parts if these are the contributions, but for the divisor.

        None if that is not known: they are not the ones of the step before, or there is no such pass.
        """
        known, pushed, additions = self._planned
        same = known.keys() == contributions.keys() and all(known[node] is contributions[node] for node in known)
        if not (pushed and same and all(writer.may_plan(version) for writer in self._in_one_pass)):
            return None
        planned = []
        for writer, (lo, _) in zip(self._in_one_pass, self._ranges, strict=True):
            assert writer.one_pass is not None
            addresses = tuple(address + ELEMENT_BYTES * lo for address in pushed)
            chunk = writer.in_one_pass(version, addresses, additions, 1.0, lr)
            divisor = Divisor(ctypes.addressof(chunk) + DIVISOR_OFFSET, self._is_buffers)
            planned.append(PlannedChunk(writer.one_pass, chunk, divisor))
        return planned

    def end_planned(self) -> None:
        """What ``plan`` gave is done, and the sum was finite everywhere."""
        self._done.update(self.parts)

    def end_pass(self, part: int, version: int, scratch: Scratch, *, finite: bool) -> None:
        """What ``in_one_pass`` gave is done.

        Args:
            part: of which it was.
            version: the committed one.
            scratch: of the calling thread.
            finite: whether the sum was finite everywhere.

        Raises:
            NonFiniteGradient: naming the key, if it was not.
        """
        if not finite and not self._is_buffers:
            lo, hi = self._ranges[part]
            self._refuse_non_finite(scratch.sum(self._sum, lo, hi), lo, hi, version + 1)
        self._done.add(part)

    def skip(self, version: int) -> None:
        """Write version ``version + 1`` as a copy of ``version``."""
        if self._is_buffers:
            self.values[(version + 1) % 2].copy_(self.values[version % 2])
        for optimizer in self._optimizers:
            optimizer.skip(version)
        self._done.update(self.parts)

    def _refuse_non_finite(self, gradient: Tensor, lo: int, hi: int, step: int) -> None:
        # A sum is far cheaper than isfinite; it may overflow by itself, so that is looked at again.
        if math.isfinite(float(gradient.sum())):
            return
        for key, first, last in self._keys:
            inside = gradient[max(first - lo, 0) : max(min(last, hi) - lo, 0)]
            if not bool(torch.isfinite(inside).all()):
                raise non_finite_gradient(key.name, step)

    # -- reading -----------------------------------------------------------------------------------------------------

    def snapshot(self, version: int, *, copy: bool = True) -> SliceSnapshot:
        """Values and optimizer state at ``version``, copied unless they are read before anything is updated."""
        parts = [optimizer.state(version) for optimizer in self._optimizers]
        names = parts[0] if parts else {}
        state = {
            name: torch.cat([part[name] for part in parts]) if value.ndim and len(parts) > 1 else value
            for name, value in names.items()
        }
        shown = SliceSnapshot(self.values[version % 2], state)
        return shown.copied() if copy else shown


def non_finite_gradient(key: str, step: int) -> NonFiniteGradient:
    """The error that names ``key`` and what to do about it."""
    return NonFiniteGradient(
        f"gradient of {key!r} is not finite in step {step}: lower --lr, set --clip-grad-norm, "
        "or drop such steps with --on-nan skip",
        key=key,
        step=step,
    )


def _squared_norm(values: Tensor) -> float:
    wide = values.double()
    return float(torch.dot(wide, wide))
