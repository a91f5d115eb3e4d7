"""One slice's optimizer, double-buffered: reads version ``t``, writes version ``t + 1``, never touches ``t``."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from paramserver.config import OptimizerConfig

__all__ = ["SliceOptimizer"]


def _build(config: OptimizerConfig, values: Tensor) -> torch.optim.Optimizer:
    # The kernel is named: fused and foreach kernels are chosen by device and size otherwise, and give other bits.
    kernel: dict[str, Any] = {"foreach": False, "fused": False}
    if config.name == "sgd":
        return torch.optim.SGD(
            [values],
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            **kernel,
        )
    cls = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return cls([values], lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, **kernel)


class SliceOptimizer:
    """``torch.optim`` on one slice with two versions of the parameters and of the optimizer's state.

    Args:
        values: the two (n,) fp32 vectors of the slice; version ``v`` lies in ``values[v % 2]``.
        config: the optimizer.
        lr_factor: factor on the learning rate of this slice's group.
    """

    def __init__(self, values: tuple[Tensor, Tensor], config: OptimizerConfig, lr_factor: float = 1.0) -> None:
        self._values = values
        self._lr_factor = lr_factor
        self._optimizers = (_build(config, values[0]), _build(config, values[1]))

    def step(self, version: int, gradient: Tensor, lr: float) -> None:
        """Write version ``version + 1`` from ``version`` and the mean gradient (n,) fp32."""
        source, target = version % 2, (version + 1) % 2
        self._values[target].copy_(self._values[source])
        self._copy_state(source, target)
        optimizer, values = self._optimizers[target], self._values[target]
        optimizer.param_groups[0]["lr"] = lr * self._lr_factor
        values.grad = gradient
        optimizer.step()
        values.grad = None

    def skip(self, version: int) -> None:
        """Write version ``version + 1`` as a copy of ``version``."""
        self._values[(version + 1) % 2].copy_(self._values[version % 2])
        self._copy_state(version % 2, (version + 1) % 2)

    def state(self, version: int) -> dict[str, Tensor]:
        """State of ``version`` by name: (n,) vectors, and scalars such as Adam's ``step``; not copied."""
        state = self._optimizers[version % 2].state.get(self._values[version % 2], {})
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}

    def load_state(self, version: int, state: Mapping[str, Tensor]) -> None:
        """Make copies of ``state`` the state of ``version``."""
        index = version % 2
        self._optimizers[index].state[self._values[index]] = {name: value.clone() for name, value in state.items()}

    def _copy_state(self, source: int, target: int) -> None:
        old = self._optimizers[source].state.get(self._values[source], {})
        new = self._optimizers[target].state[self._values[target]]
        if not old:
            new.clear()
        for name, value in old.items():
            if isinstance(value, Tensor) and isinstance(new.get(name), Tensor):
                new[name].copy_(value)
            else:
                new[name] = value.clone() if isinstance(value, Tensor) else value
