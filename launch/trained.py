"""Opening what a run has trained: its settings, its task, and its model with the weights of a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from launch.resolve import choose_device, task_options, usage_errors
from launch.run_folder import RunFolder
from models.registry import build_task, read_task
from models.task import Task
from paramserver.config import OptimizerConfig, ServerConfig
from paramserver.errors import CheckpointError
from workers.checkpoint import find_checkpoint, load_checkpoint
from workers.config import PlanConfig, WorkerConfig
from workers.device import keep_freed_memory, setup_device
from workers.replica import Replica, describe_model

__all__ = ["Trained", "open_trained"]


@dataclass(frozen=True)
class Trained:
    """A task and its trained model in this process."""

    folder: RunFolder
    """Of the run."""
    step: int
    """Step of the checkpoint."""
    task: Task
    replica: Replica
    """The model with the checkpoint's weights, on the run's kind of device."""
    worker: WorkerConfig
    """Threads, layout and precision of the run, for a single worker."""


def open_trained(run: str, *, data: str | None = None, threads: int | None = None) -> Trained:
    """Open a run folder at its newest checkpoint, or one checkpoint of it.

    Args:
        run: the run folder, or ``checkpoints/step_N`` in it.
        data: other data than the run's.
        threads: other threads than the run's.

    Raises:
        ConfigError: if it is not a run folder, or its task or data are gone.
        CheckpointError: if there is no checkpoint, it is damaged, or it does not fit the task's model.
    """
    folder = RunFolder.of_checkpoint(Path(run))
    config = folder.read_config()
    config = replace(config, data=data or config.data, threads=config.threads if threads is None else threads)
    if config.device == "cuda" and not torch.cuda.is_available():
        config = replace(config, device="auto")  # trained on a GPU, looked at elsewhere
    path = find_checkpoint(Path(run).expanduser())
    with usage_errors():
        task = build_task(read_task(config.task), task_options(config))
        model = task.build_model()
    state, _ = load_checkpoint(path)
    _load(model, state.state_dict(), path)
    worker = WorkerConfig(
        plan=PlanConfig(batch_size=1, microbatches=1, steps=1, seed=config.seed),
        device=choose_device(config),
        threads=config.threads,
        channels_last=config.channels_last,
        precision=config.precision,
    )
    layout = torch.channels_last if worker.channels_last else torch.contiguous_format
    device = setup_device(worker)
    keep_freed_memory(device)
    model = model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    # The same replica as in training: kernels may depend on where a parameter lies.
    partition, _ = describe_model(model, OptimizerConfig(), ServerConfig())
    return Trained(folder, state.version, task, Replica(model, partition), worker)


def _load(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    stored = {name: tuple(value.shape) for name, value in weights.items()}
    for name in sorted(own.keys() | stored.keys()):
        if own.get(name) != stored.get(name):
            raise CheckpointError(
                f"checkpoint {path} does not fit the model: {name!r} is {stored.get(name, 'missing')} in the one and "
                f"{own.get(name, 'missing')} in the other; task file, model and classes must be those of the run"
            )
    model.load_state_dict(weights, strict=True)
