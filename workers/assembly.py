"""Putting a worker together, for each backend, out of the same parts."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.task import Task
from paramserver.client import Client
from paramserver.config import OptimizerConfig, ServerConfig
from paramserver.partition import Partition
from paramserver.state import State
from paramserver.transport.protocol import Transport
from workers.compiled import compile_model
from workers.config import WorkerConfig
from workers.ddp import DdpBackend
from workers.device import setup_device, update_threads
from workers.faults import Observer
from workers.local_servers import LocalServers
from workers.minibatch import deal_runs
from workers.param_server import ParamServerBackend
from workers.replica import Replica, describe_model, freeze_batch_norm
from workers.samples import MicrobatchLoader
from workers.seeding import seeded
from workers.single import SingleBackend
from workers.worker import Worker

__all__ = [
    "Described",
    "Parts",
    "build_ddp_worker",
    "build_model",
    "build_param_server_worker",
    "build_parts",
    "build_single_worker",
    "describe",
]


class Described(NamedTuple):
    """A model, how it is cut, and its initial state."""

    model: nn.Module
    partition: Partition
    state: State


class Parts(NamedTuple):
    """A model on its device, how it is cut, and its initial state."""

    replica: Replica
    partition: Partition
    state: State


def build_model(task: Task, config: WorkerConfig) -> nn.Module:
    """A task's model with its initial values, which the run's seed decides, in each process the same."""
    with seeded("model", config.plan.seed):
        model = task.build_model()
    if config.freeze_batch_norm:
        freeze_batch_norm(model)
    return model


def describe(
    task: Task,
    config: WorkerConfig,
    optimizer: OptimizerConfig,
    servers: ServerConfig,
    device: torch.device | None = None,
) -> Described:
    """Build the model in its memory format, and cut it. For whoever does not train: the process stays as it is."""
    model = build_model(task, config)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model = model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    return Described(model, *describe_model(model, optimizer, servers))


def build_parts(task: Task, config: WorkerConfig, optimizer: OptimizerConfig, servers: ServerConfig) -> Parts:
    """Build the model, move it to its device, and carve it into a flat vector."""
    model, partition, state = describe(task, config, optimizer, servers, setup_device(config))
    if config.compile:
        compile_model(model)
    return Parts(Replica(model, partition), partition, state)


def build_single_worker(
    task: Task,
    config: WorkerConfig,
    optimizer: OptimizerConfig,
    servers: ServerConfig,
    stop_requested: Callable[[], bool],
    resume: State | None = None,
) -> tuple[Worker, SingleBackend]:
    """The only worker of a ``single`` run."""
    replica, partition, state = build_parts(task, config, optimizer, servers)
    threads = update_threads(config.device, config.num_workers)
    local = LocalServers(partition, optimizer, config.plan.microbatches, resume or state, threads)
    backend = SingleBackend(replica, local, config.plan.microbatches, stop_requested, config.step_timeout_s)
    return Worker(task, config, replica, backend), backend


def build_param_server_worker(
    task: Task,
    config: WorkerConfig,
    replica: Replica,
    transport: Transport,
    loader: MicrobatchLoader | None = None,
    faults: Observer | None = None,
    generation: int | None = None,
) -> tuple[Worker, ParamServerBackend]:
    """One worker of a parameter-server run.

    Args:
        task: what is learned.
        config: its place and settings.
        replica: its model.
        transport: its way to the servers.
        loader: of the training set; None makes one.
        faults: what is to happen to it, if anything is.
        generation: see ``Client``.
    """
    client = Client(config.called, replica.partition, transport, config.step_timeout_s, generation)
    run = deal_runs(config.plan.microbatches, config.num_workers)[config.worker]
    backend = ParamServerBackend(
        replica,
        client,
        run,
        config.plan.microbatches,
        overlap=config.overlap,
        early_forward=config.early_forward,
    )
    return Worker(task, config, replica, backend, loader, faults), backend


def build_ddp_worker(
    task: Task,
    config: WorkerConfig,
    optimizer: OptimizerConfig,
    servers: ServerConfig,
    stop_requested: Callable[[], bool],
    resume: State | None = None,
) -> tuple[Worker, DdpBackend]:
    """One torchrun rank; the process group must have been joined."""
    replica, partition, state = build_parts(task, config, optimizer, servers)
    threads = update_threads(config.device, config.num_workers)
    local = LocalServers(partition, optimizer, config.plan.microbatches, resume or state, threads)
    empty_loss = _sample_loss(task, replica.device, channels_last=config.channels_last)
    backend = DdpBackend(replica, local, config.plan.microbatches, empty_loss, stop_requested, config.step_timeout_s)
    return Worker(task, config, replica, backend), backend


def _sample_loss(task: Task, device: torch.device, *, channels_last: bool) -> Callable[[nn.Module], Tensor]:
    """The loss of the first training sample: what a rank without samples calls ``backward`` on."""

    def loss(model: nn.Module) -> Tensor:
        with seeded("empty"):
            batch = task.collate([task.build_dataset("train")[0]] * 2)
        return task.loss(model, batch.to(device, channels_last=channels_last)).total

    return loss
