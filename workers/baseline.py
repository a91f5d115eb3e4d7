"""The tuned plain torch loop that speedups are measured against: whole minibatch at once, no tree, no Ray."""

import itertools
import time
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from models.task import Task
from paramserver.config import OptimizerConfig
from workers.compiled import compile_model
from workers.config import WorkerConfig
from workers.device import keep_freed_memory, setup_device
from workers.precision import autocast
from workers.samples import begun, drawn, where_drawn
from workers.seeding import derive_seed, seeded
from workers.timing import PHASES

__all__ = ["train_baseline"]

_MARKED = ("split", "compute", "update")
"""What a plain loop does in a step; the other stages do not exist in it."""


def train_baseline(task: Task, config: WorkerConfig, optimizer: OptimizerConfig) -> list[dict[str, float]]:
    """Train ``config.plan.steps`` steps on one device as fast as plain torch can.

    Data set, transforms, collation, layout, precision and threads are those of the other backends. What they must not
    use and this loop may: the whole minibatch in one forward pass, fused optimizer kernels, cuDNN's own choice of
    kernels, no wait for the device in a step.

    Returns:
        for each step the milliseconds by stage, of which only split, compute and update can be above 0.
    """
    device = setup_device(config)
    keep_freed_memory(device)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    torch.backends.cudnn.benchmark = True
    with seeded("model", config.plan.seed):
        model = task.build_model()
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model = model.to(device=device, memory_format=layout).train()  # type: ignore[call-overload]
    if config.compile:
        compile_model(model)
    sgd = _build_optimizer(model, optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    torch.manual_seed(derive_seed("baseline", config.plan.seed))
    batches = itertools.chain.from_iterable(map(begun, itertools.repeat(_loader(task, config))))
    clock = _CudaClock() if device.type == "cuda" else _Clock()
    clock.mark()
    for step in range(config.plan.steps):
        batch = drawn(batches).to(device, channels_last=config.channels_last)
        clock.mark()
        for group in sgd.param_groups:
            group["lr"] = optimizer.learning_rate(step) * group["lr_factor"]
        with autocast(device.type, config.precision):
            loss = task.loss(model, batch)
        mean = loss.total / loss.weight.clamp(min=1.0).to(loss.total.dtype)
        scaler.scale(mean).backward()  # type: ignore[no-untyped-call]
        clock.mark()
        scaler.step(sgd)
        scaler.update()
        sgd.zero_grad(set_to_none=True)
        clock.mark()
    return _by_stage(clock.intervals_ms())


def _loader(task: Task, config: WorkerConfig) -> DataLoader[Any]:
    dataset, settings = where_drawn(task.build_dataset("train"), task, config.loader_processes)
    return DataLoader(
        dataset,
        batch_size=config.plan.batch_size,
        shuffle=True,
        drop_last=True,
        pin_memory=config.device == "cuda",
        **settings,
    )


def _build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The fused kernel: the fastest on CUDA, and on one CPU core too (13.0 M parameters: 36.5 ms, foreach 38.5 ms)."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and not config.is_frozen(name))
        if parameter.requires_grad:
            groups.setdefault(config.lr_factor(name), []).append(parameter)
    params = [{"params": group, "lr_factor": factor} for factor, group in groups.items()]
    if config.name == "sgd":
        return torch.optim.SGD(
            params,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            fused=True,
        )
    cls = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return cls(params, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True)


class _Clock:
    """Times between marks on the host's clock."""

    def __init__(self) -> None:
        self._seconds: list[float] = []

    def mark(self) -> None:
        """Note the time."""
        self._seconds.append(time.perf_counter())

    def intervals_ms(self) -> list[float]:
        """Milliseconds from each mark to the next."""
        return [1e3 * (end - begin) for begin, end in itertools.pairwise(self._seconds)]


class _CudaClock(_Clock):
    """Times between marks on the GPU's clock, so that the loop need not wait for the GPU to be measured."""

    def __init__(self) -> None:
        super().__init__()
        self._events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        """Note the time at which the GPU gets here."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._events.append(event)

    def intervals_ms(self) -> list[float]:
        """Milliseconds from each mark to the next."""
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in itertools.pairwise(self._events)]


def _by_stage(intervals_ms: list[float]) -> list[dict[str, float]]:
    size = len(_MARKED)
    steps = [intervals_ms[start : start + size] for start in range(0, len(intervals_ms), size)]
    return [dict.fromkeys(PHASES, 0.0) | dict(zip(_MARKED, step, strict=True)) for step in steps]
