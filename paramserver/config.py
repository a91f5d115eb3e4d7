"""Optimizer and server settings, and the learning rate as a function of the step. Imports neither torch nor ray."""

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from paramserver.errors import ConfigError

__all__ = ["OnNan", "OptimizerConfig", "OptimizerName", "ScheduleName", "ServerConfig", "WirePrecision"]

OptimizerName = Literal["sgd", "adam", "adamw"]
ScheduleName = Literal["constant", "step", "cosine", "polynomial"]
OnNan = Literal["stop", "skip"]
WirePrecision = Literal["fp32", "bf16", "fp16"]

MIB = 1 << 20
ALIGNMENT_BYTES = 256
"""Every key starts on such a boundary: 64 would do on a CPU, CUDA wants 256, and one layout for both is simpler."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer that all backends share. Only element-wise ones: a slice must not need to see another slice."""

    name: OptimizerName = "sgd"
    """``torch.optim``'s SGD, Adam or AdamW."""
    lr: float = 0.01
    """Peak learning rate."""
    momentum: float = 0.0
    """Momentum of SGD."""
    nesterov: bool = False
    """Nesterov momentum of SGD."""
    weight_decay: float = 0.0
    """L2 penalty; decoupled for AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's and AdamW's moments."""
    eps: float = 1e-8
    """Term in Adam's and AdamW's denominator."""
    schedule: ScheduleName = "constant"
    """Course of the learning rate after the warm-up."""
    total_steps: int = 1
    """Steps of the whole run: where cosine and polynomial end."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly."""
    decay_steps: int = 0
    """``step``: multiply by ``decay_factor`` every so many steps; 0 means a third of the run."""
    decay_factor: float = 0.1
    """``step``: the factor."""
    power: float = 0.9
    """``polynomial``: the power (0.9 as in torchvision's segmentation reference)."""
    lr_factors: tuple[tuple[str, float], ...] = ()
    """Pairs of key pattern (``fnmatch``) and factor on the learning rate; the first match counts."""
    frozen: tuple[str, ...] = ()
    """Patterns of keys that are not trained."""
    clip_grad_norm: float | None = None
    """Largest l2 norm of the whole gradient, or None."""
    on_nan: OnNan = "stop"
    """What a non-finite gradient does: end the run by the key's name, or drop the step."""

    def __post_init__(self) -> None:
        if self.name not in get_args(OptimizerName):
            raise ConfigError(
                f"optimizer {self.name!r}: use one of {', '.join(get_args(OptimizerName))} "
                "(others are not element-wise: their result would depend on how parameters are sliced)"
            )
        if self.schedule not in get_args(ScheduleName):
            raise ConfigError(f"schedule {self.schedule!r}: use one of {', '.join(get_args(ScheduleName))}")
        if self.on_nan not in get_args(OnNan):
            raise ConfigError(f"on_nan {self.on_nan!r}: use one of {', '.join(get_args(OnNan))}")
        for field in ("lr", "momentum", "weight_decay", "warmup_steps", "decay_steps"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{field} is {value}: it must be a finite number, 0 or more")
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise ConfigError(f"betas are {self.betas}: each must be 0 or more and below 1")
        for pattern, factor in self.lr_factors:
            if not (math.isfinite(factor) and factor >= 0):
                raise ConfigError(f"factor of {pattern!r} is {factor}: it must be a finite number, 0 or more")
        if self.nesterov and self.momentum == 0:
            raise ConfigError("nesterov needs a momentum above 0")
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise ConfigError(f"clip_grad_norm is {self.clip_grad_norm}: it must be above 0, or left out")

    @property
    def needs_vote(self) -> bool:
        """Whether servers must agree before a step is applied (E8)."""
        return self.clip_grad_norm is not None or self.on_nan == "skip"

    def learning_rate(self, step: int) -> float:
        """Learning rate of the update that takes version ``step`` to ``step + 1``, before ``lr_factors``."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        done, total = step - self.warmup_steps, max(1, self.total_steps - self.warmup_steps)
        left = max(0.0, 1.0 - done / total)
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1.0 + math.cos(math.pi * (1.0 - left)))
        if self.schedule == "polynomial":
            return float(self.lr * left**self.power)
        if self.schedule == "step":
            return float(self.lr * self.decay_factor ** (done // (self.decay_steps or max(1, total // 3))))
        return self.lr

    def lr_factor(self, key: str) -> float:
        """Factor on the learning rate of ``key``."""
        return next((factor for pattern, factor in self.lr_factors if fnmatch.fnmatchcase(key, pattern)), 1.0)

    def is_frozen(self, key: str) -> bool:
        """Whether ``key`` is not trained."""
        return any(fnmatch.fnmatchcase(key, pattern) for pattern in self.frozen)

    def check_patterns(self, keys: Sequence[str]) -> None:
        """Refuse patterns that fit no key: they are typing errors.

        Raises:
            ConfigError: naming the pattern.
        """
        for pattern in (*(pattern for pattern, _ in self.lr_factors), *self.frozen):
            if not fnmatch.filter(keys, pattern):
                raise ConfigError(
                    f"pattern {pattern!r} fits none of the model's {len(keys)} parameters, e.g. {keys[0]!r}"
                )


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How parameters are cut and placed."""

    num_servers: int = 1
    """Servers among which slices are placed."""
    slice_bytes: int = MIB
    """Largest slice in bytes, a multiple of 256."""

    def __post_init__(self) -> None:
        if self.num_servers < 1:
            raise ConfigError(f"servers is {self.num_servers}: at least one server must hold the parameters")
        if self.slice_bytes < ALIGNMENT_BYTES or self.slice_bytes % ALIGNMENT_BYTES:
            raise ConfigError(f"slice size is {self.slice_bytes} bytes: it must be a multiple of {ALIGNMENT_BYTES}")
