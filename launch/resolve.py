"""From what the user said to what will run: recipe, data set and machine fill the gaps, and everything is checked."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cluster.session import check_address
from launch.config import RunConfig, parse_image_size, parse_pairs, parse_steps
from launch.downloads import name_or_path
from launch.fault_file import read_faults
from models.errors import TaskError
from models.options import Recipe, TaskOptions
from models.registry import TaskSource, build_task, read_task
from models.task import Task, recipe_of
from paramserver.arena import check_room
from paramserver.config import OptimizerConfig, ServerConfig
from paramserver.errors import ConfigError
from paramserver.partition import ELEMENT_BYTES, Partition
from paramserver.reduction import maximal_nodes
from workers.assembly import build_model
from workers.compiled import check_compiler
from workers.config import DeviceKind, PlanConfig, WorkerConfig
from workers.minibatch import deal_runs, steps_in_epoch
from workers.process_group import torchrun_rank
from workers.replica import describe_model

__all__ = ["Resolved", "choose_device", "resolve", "task_options", "usage_errors"]

_BACKSTOP_S = 1800.0
_LOADERS_OF_A_GPU = 2
_KEEPS_STORE_ORDER = ("x86_64", "AMD64")
"""Processors (``platform.machine()``) that show others what one core writes in the order in which it writes it."""


@dataclass(frozen=True)
class Resolved:
    """A run that can start."""

    config: RunConfig
    """The settings with every gap filled."""
    source: TaskSource
    task: Task
    options: TaskOptions
    worker: WorkerConfig
    """Settings of worker 0."""
    optimizer: OptimizerConfig
    servers: ServerConfig
    num_samples: int
    """Length of the training set."""

    @property
    def simulated(self) -> bool:
        """Whether CPU cores stand in for GPUs."""
        return self.worker.device == "cpu"


def task_options(config: RunConfig) -> TaskOptions:
    """What the task of a run is built from; paths are made absolute, since actors run elsewhere."""
    kind, colon, path = config.data.partition(":")
    data = f"{kind}:{Path(path).expanduser().resolve()}" if path else kind + colon
    classes = tuple(name.strip() for name in config.classes.split(",")) if config.classes else None
    if classes is not None and len(set(classes)) < len(classes):
        raise ConfigError(f"--classes {config.classes}: each name may stand there once")
    return TaskOptions(
        data=data,
        model=config.model,
        image_size=parse_image_size(config.image_size),
        classes=classes,
        split_train=config.split_train,
        split_val=config.split_val,
        augment=config.augment,
        image_cache=config.image_cache,
        recipe=config.recipe,
        seed=config.seed,
    )


@contextmanager
def usage_errors() -> Iterator[None]:
    """What is wrong with a task or its data before anything was started is a matter of usage."""
    try:
        yield
    except TaskError as error:
        raise ConfigError(str(error)) from error


@usage_errors()
def resolve(config: RunConfig) -> Resolved:
    """Fill the gaps and check that the run can start; reads the data set's index, writes nothing.

    Raises:
        ConfigError: what is wrong, and the remedy.
    """
    if not config.task:
        raise ConfigError("no task: say pushpull train ssd, pushpull train fcn, or pushpull train my_task.py:MyTask")
    source = read_task(config.task)
    options = task_options(config)
    task = build_task(source, options)
    recipe = _recipe(task, config.recipe)
    if config.faults is not None:
        if config.backend != "ps":
            raise ConfigError(f"--faults with --backend {config.backend}: only ps goes on after a fault")
        read_faults(config.faults, Path())  # what is wrong with it comes out now
    device = choose_device(config)
    if config.compile:
        check_compiler(device)
    workers = _workers(config, device)
    batch_size = config.batch_size or recipe.batch_size
    microbatches = config.microbatches or min(batch_size, 1 << (workers - 1).bit_length())
    num_samples: int = len(task.build_dataset("train"))  # type: ignore[arg-type]
    if num_samples < 1:
        raise ConfigError(f"--data {config.data}: the training set is empty")
    if config.evaluate:
        task.build_dataset("val")  # what is missing there would come out at the end of the run
    if config.backend == "ps" and config.address is not None:
        check_address(config.address)
    per_epoch = max(1, steps_in_epoch(num_samples, batch_size, drop_last=config.drop_last))
    steps = config.steps or (config.epochs or recipe.epochs) * per_epoch
    profiled = parse_steps(config.profile_steps)
    if profiled is not None and profiled[1] > steps:
        raise ConfigError(f"--profile-steps {config.profile_steps}: the run has {steps} steps")
    filled = replace(
        config,
        task=source.name,
        data=options.data,
        weights=None if config.weights is None else name_or_path(config.weights),
        workers=workers,
        microbatches=microbatches,
        batch_size=batch_size,
        steps=steps,
        # Where every core computes, a server that works during backward only takes its time away from it.
        overlap=workers * config.threads < (os.cpu_count() or 1) if config.overlap is None else config.overlap,
        loader_processes=_loader_processes(config, device),
        **_filled_recipe(config, recipe),
    )
    servers = ServerConfig(num_servers=config.servers if config.backend == "ps" else 1, slice_bytes=config.slice_bytes)
    optimizer = _optimizer(filled, recipe)
    worker = _worker(filled, device, votes=optimizer.needs_vote)
    if filled.early_forward is None:
        filled = replace(
            filled, early_forward=worker.early_forward and config.backend == "ps" and config.transport != "ray"
        )
    partition, _ = describe_model(build_model(task, worker), optimizer, servers)  # finds patterns that fit no key
    if config.backend == "ps" and config.address is None:
        _check_shared_memory(config, partition, workers, microbatches)
    return Resolved(filled, source, task, options, worker, optimizer, servers, num_samples)


def _worker(config: RunConfig, device: DeviceKind, *, votes: bool) -> WorkerConfig:
    """Of a run whose gaps are filled."""
    assert config.batch_size and config.microbatches and config.steps and config.workers  # noqa: PT018
    plan = PlanConfig(
        batch_size=config.batch_size,
        microbatches=config.microbatches,
        steps=config.steps,
        seed=config.seed,
        drop_last=config.drop_last,
    )
    return WorkerConfig(
        plan=plan,
        num_workers=config.workers,
        device=device,
        threads=config.threads,
        channels_last=config.channels_last,
        precision=config.precision,
        compile=config.compile,
        loader_processes=config.loader_processes or 0,
        freeze_batch_norm=config.freeze_batch_norm,
        eval_every=config.eval_every,
        evaluate=config.evaluate,
        overlap=bool(config.overlap),
        # With a vote the last slice may still drop the step: nobody may have begun with the others (E8). And only x86
        # promises that whoever sees a slice's word sees the slice.
        early_forward=(device == "cuda" if config.early_forward is None else config.early_forward)
        and not votes
        and not config.compile
        and platform.machine() in _KEEPS_STORE_ORDER,
        # Of a worker's own waits: whoever watches the run has acted long before.
        step_timeout_s=2 * config.step_timeout + 30 if config.step_timeout else _BACKSTOP_S,
    )


def _loader_processes(config: RunConfig, device: DeviceKind) -> int:
    """Where cores compute, whoever draws samples in the background only takes their time."""
    if config.loader_processes is None:
        return _LOADERS_OF_A_GPU if device == "cuda" else 0
    return config.loader_processes


def _check_shared_memory(config: RunConfig, partition: Partition, workers: int, microbatches: int) -> None:
    """Both versions of the parameters, and a vector for each tree node that a worker sends."""
    runs = deal_runs(microbatches, workers)
    nodes = sum(len(maximal_nodes(run.start, run.stop, microbatches)) for run in runs)
    check_room(Path(config.arena_dir), (2 + nodes) * ELEMENT_BYTES * partition.length)


def _recipe(task: Task, name: str) -> Recipe:
    try:
        return recipe_of(task, name)
    except KeyError:
        names = ", ".join(getattr(task, "recipes", {})) or "default"
        raise ConfigError(f"task {task.name} has no recipe {name!r}: use one of {names}") from None


def _filled_recipe(config: RunConfig, recipe: Recipe) -> dict[str, Any]:
    names = ("optimizer", "lr", "momentum", "nesterov", "weight_decay", "schedule", "warmup_steps")
    filled = {name: getattr(recipe, name) if getattr(config, name) is None else getattr(config, name) for name in names}
    if config.lr_factors is None and recipe.lr_factors:
        filled["lr_factors"] = ",".join(f"{pattern}={factor}" for pattern, factor in recipe.lr_factors)
    return filled


def _optimizer(config: RunConfig, recipe: Recipe) -> OptimizerConfig:
    assert config.optimizer is not None
    assert config.schedule is not None
    return OptimizerConfig(
        name=config.optimizer,
        lr=config.lr if config.lr is not None else recipe.lr,
        momentum=config.momentum or 0.0,
        nesterov=bool(config.nesterov),
        weight_decay=config.weight_decay or 0.0,
        schedule=config.schedule,
        total_steps=config.steps or 1,
        warmup_steps=config.warmup_steps or 0,
        lr_factors=parse_pairs(config.lr_factors) if config.lr_factors else (),
        frozen=tuple(part.strip() for part in config.freeze.split(",")) if config.freeze else (),
        clip_grad_norm=config.clip_grad_norm,
        on_nan=config.on_nan,
    )


def choose_device(config: RunConfig) -> DeviceKind:
    """Kind of device of a run on this machine.

    Raises:
        ConfigError: if it wants a GPU and there is none.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError("--device cuda, but torch sees no GPU: leave it out, or install a CUDA build and a driver")
    return "cuda" if available and config.device != "cpu" else "cpu"


def _workers(config: RunConfig, device: DeviceKind) -> int:
    rank = torchrun_rank()
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    if config.backend == "single":
        if config.workers not in (None, 1):
            raise ConfigError(f"--backend single has one worker, not {config.workers}: use --backend ps or ddp")
        return 1
    if config.backend == "ddp" and rank is not None:
        if config.workers not in (None, rank.world_size):
            raise ConfigError(f"torchrun started {rank.world_size} ranks, but --workers is {config.workers}")
        return rank.world_size
    workers = config.workers or gpus or 1
    if gpus and workers > gpus and config.backend == "ddp":
        raise ConfigError(
            f"{workers} ranks, but {gpus} GPUs: NCCL wants one each; lower --workers, or say --device cpu"
        )
    if gpus and workers > gpus and not config.share_device and config.address is None:
        raise ConfigError(f"{workers} workers, but {gpus} GPUs: lower --workers, or allow it with --share-device")
    return workers
