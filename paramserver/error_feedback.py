"""Rounds contributions to 16 bits, and adds to each one what rounding has left over of those before it.

::

    c = v + r         a contribution, and what is still owed
    q = round(c)      what goes over the wire
    r = c - q         what is owed from now on: exact in fp32 as long as q is not the largest finite number

Seide et al. 2014, "1-bit stochastic gradient descent"; Karimireddy et al. 2019, "Error feedback fixes SignSGD".
"""

import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from paramserver.config import WirePrecision
from paramserver.messages import Push
from paramserver.partition import BUFFERS, Partition
from paramserver.reduction import Node
from paramserver.residuals import SliceResiduals

__all__ = ["ErrorFeedback"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_NO_STEP = -1
_NO_RESIDUALS: SliceResiduals = {}


@dataclass
class _Residual:
    """(n,) fp32 before and after the push of ``step``, side by side as all that an update writes (E5)."""

    before: Tensor
    after: Tensor
    step: int


class ErrorFeedback:
    """The residuals of whoever sends contributions over a wire; may be read by another thread than the one that sends.

    Residuals belong to tree nodes: when the membership changes (a push of another generation), all are dropped.

    Args:
        precision: ``bf16`` or ``fp16``.
        partition: of the run.
        residuals: what an earlier life of the run left over.
        held_versions: versions whose residuals are kept until they were read.
    """

    def __init__(
        self,
        precision: WirePrecision,
        partition: Partition,
        residuals: SliceResiduals = _NO_RESIDUALS,
        held_versions: Iterable[int] = (),
    ) -> None:
        self.dtype = _DTYPES[precision]
        self._limit = torch.finfo(self.dtype).max
        self._partition = partition
        self._held_versions = set(held_versions)
        self._held = {
            place: _Residual(torch.zeros_like(value), value.clone(), _NO_STEP) for place, value in residuals.items()
        }
        self._kept: dict[int, dict[tuple[int, Node], Tensor]] = {}
        self._generation: int | None = None
        self._lock = threading.Lock()

    def round(self, push: Push) -> dict[int, Tensor]:
        """The push's slices in 16 bits, (n,) each; a repetition of a push gives the same bits.

        Slices of buffers are left out, they go as they are: they are small, and what they hold is state that no later
        step corrects. What is too large for fp16 becomes its largest number, the rest is owed. What is not finite goes
        as it is and leaves no residual. The push is not modified.
        """
        with self._lock:
            self._begin(push)
            return {
                index: self._round(index, push, values)
                for index, values in push.slices.items()
                if self._partition.slices[index].group != BUFFERS
            }

    def _begin(self, push: Push) -> None:
        if self._generation is None:  # what the run begins with stands in a checkpoint already
            self._held_versions.discard(push.step)
        elif self._generation != push.generation:
            self._held.clear()
        self._generation = push.generation
        if push.step in self._held_versions and push.step not in self._kept:
            self._kept[push.step] = self._copy(push.step)

    def _round(self, index: int, push: Push, values: Tensor) -> Tensor:
        held = self._held.get((index, push.node))
        if held is None:
            held = _Residual(torch.zeros_like(values), torch.zeros_like(values), _NO_STEP)
            self._held[index, push.node] = held
        if held.step != push.step:
            held.before, held.after, held.step = held.after, held.before, push.step
        left = torch.add(held.before, values, out=held.after)
        rounded = left.clamp(-self._limit, self._limit).to(self.dtype)
        left.sub_(rounded)
        # What is finite leaves something finite, so one sum over the residuals finds whatever is not.
        if not math.isfinite(float(left.sum())):
            odd = ~left.isfinite()
            rounded[odd] = (held.before[odd] + values[odd]).to(self.dtype)
            left[odd] = 0.0
        return rounded

    def take_back(self, step: int) -> None:
        """The servers dropped the step: what it owed before is owed again. May be called more than once."""
        with self._lock:
            for held in self._held.values():
                if held.step == step:
                    held.after.copy_(held.before)

    def residuals(self, version: int, *, release: bool = False) -> SliceResiduals:
        """Copies of the residuals at a committed version: the last one, or one that is held (and is given free)."""
        with self._lock:
            found = self._kept[version] if version in self._kept else self._copy(version)
            if release:  # also if the push that would have had it kept is still to come
                self._held_versions.discard(version)
                self._kept.pop(version, None)
            return found

    def _copy(self, version: int) -> dict[tuple[int, Node], Tensor]:
        """At ``version``: after the push of the step before it, whether or not the next one has begun."""
        assert all(held.step <= version for held in self._held.values()), f"version {version} is not held"
        return {
            place: (held.after if held.step < version else held.before).clone() for place, held in self._held.items()
        }
