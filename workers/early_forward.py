"""The next step's first forward pass, begun while servers still update: each module waits for its own parameters.

That is safe because slices are independent: a slice that stands at the next version has its final bits. It is not with
a vote (E8), in which the last slice may still drop the whole step, so whoever uses this must not do so then.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from paramserver.partition import BUFFERS, Slice
from workers.replica import Replica

__all__ = ["EarlyForward"]


class EarlyForward:
    """Hooks a replica's modules; use ``close`` at the end.

    A parameter that is used before the forward pass of the module that owns it has begun (by a parent that reads
    ``self.child.weight``, say) is found while an ordinary pass is watched, and waited for in advance; so are those of
    modules that are never entered (inside a scripted one, say).

    Args:
        replica: whose forward passes begin early.
        bring: called with slices that are about to be used; returns once they have their next version.
    """

    def __init__(self, replica: Replica, bring: Callable[[Sequence[Slice]], None]) -> None:
        partition = replica.partition
        self._slices = partition.slices
        self._bring = bring
        slices_of: dict[str, list[int]] = {}
        for piece, held in zip(partition.slices, partition.pieces, strict=True):
            for key, _, _ in held:
                slices_of.setdefault(key.name, []).append(piece.index)
        names = {parameter: key.name for key, parameter in replica.parameters}
        self._hooks: list[RemovableHandle] = []
        self._wanted: dict[nn.Module, set[int]] = {}
        self._owned: dict[nn.Parameter, tuple[nn.Module, list[int]]] = {}
        for module in replica.model.modules():
            own = [parameter for parameter in module.parameters(recurse=False) if parameter in names]
            for parameter in own:
                self._owned[parameter] = (module, slices_of.get(names[parameter], []))
            if own:
                self._wanted[module] = {index for parameter in own for index in self._owned[parameter][1]}
                self._hooks.append(module.register_forward_pre_hook(self._enter))
        self._first = {piece.index for piece in partition.slices if piece.group == BUFFERS}
        self._missing: set[int] = set()
        self._entered: set[nn.Module] = set()
        self.learned = False
        """Whether a forward pass was watched."""
        self.waited_s = 0.0
        """Seconds spent in ``bring`` since somebody set this to 0."""

    def _enter(self, module: nn.Module, _: Any) -> None:
        self._entered.add(module)
        if self._missing:
            self._need(self._wanted[module])

    def _need(self, indices: Collection[int]) -> None:
        needed = self._missing.intersection(indices)
        if needed:
            begin = time.perf_counter()
            self._bring([self._slices[index] for index in sorted(needed)])
            self._missing -= needed
            self.waited_s += time.perf_counter() - begin

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around an ordinary forward pass: learns which parameters are used before their own module's."""
        self._entered.clear()
        with _Uses(self._used):
            yield
        for module, slices in self._wanted.items():
            if module not in self._entered:  # nobody uses it, or in a way that no hook sees
                self._first |= slices
        self.learned = True

    def _used(self, parameter: nn.Parameter) -> None:
        owner, slices = self._owned.get(parameter, (None, []))
        if owner is not None and owner not in self._entered:
            self._first.update(slices)

    @contextmanager
    def early(self) -> Iterator[None]:
        """Around a forward pass whose parameters are only being updated; on entry the buffers have been."""
        self._missing = {piece.index for piece in self._slices}
        self._need(self._first)
        with _Uses(self._read):
            yield

    def _read(self, parameter: nn.Parameter) -> None:
        # Another way through the model than the one that was watched.
        if self._missing and parameter in self._owned:
            self._need(self._owned[parameter][1])

    def close(self) -> None:
        """Take the hooks out of the model again."""
        for hook in self._hooks:
            hook.remove()

    def bring_rest(self) -> None:
        """After the commit: have the slices that the early pass did not read."""
        if self._missing:
            self._bring([self._slices[index] for index in sorted(self._missing)])
            self._missing = set()


_ABOUT = {
    getattr(torch.Tensor, name).__get__
    for name in ("device", "dtype", "is_cuda", "layout", "ndim", "requires_grad", "shape")
}
"""What is asked of a tensor without reading it."""


class _Uses(TorchFunctionMode):
    """Calls back with each parameter that an operation reads."""

    def __init__(self, used: Callable[[nn.Parameter], None]) -> None:
        super().__init__()
        self._used = used

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _ABOUT:
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, nn.Parameter):
                    self._used(value)
        return func(*args, **(kwargs or {}))
