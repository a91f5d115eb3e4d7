"""What a worker must know of the run. Imports neither torch nor ray."""

from dataclasses import dataclass
from typing import Literal, get_args

from paramserver.errors import ConfigError

__all__ = ["DeviceKind", "PlanConfig", "Precision", "ProfileConfig", "WorkerConfig"]

Precision = Literal["fp32", "bf16", "fp16"]
DeviceKind = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """How samples become minibatches and microbatches: part of the run, not of the machines it runs on."""

    batch_size: int
    """Samples of one minibatch, over all workers."""
    microbatches: int
    """``M``: parts a minibatch is cut into; the leaves of the canonical tree."""
    steps: int
    """Steps of the whole run."""
    seed: int = 0
    """Seed of everything that is drawn."""
    drop_last: bool = False
    """Whether a short minibatch at the end of an epoch is left out."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch size is {self.batch_size}: a minibatch needs at least one sample")
        if self.microbatches < 1:
            raise ConfigError(f"microbatches is {self.microbatches}: a minibatch has at least one part")
        if self.microbatches > self.batch_size:
            raise ConfigError(
                f"{self.microbatches} microbatches, but only {self.batch_size} samples in a minibatch: "
                "lower --microbatches or raise --batch-size"
            )
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}: a run has at least one step")


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Of which steps each worker writes a trace."""

    first: int
    """The first one, from 1."""
    last: int
    """The last one, which is recorded, too."""
    folder: str
    """Where ``worker-N.json.gz`` is written, on the worker's own machine."""


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """One worker's place in the run and the settings of its device."""

    plan: PlanConfig
    """The run's minibatches."""
    worker: int = 0
    """Which worker: its place among those that compute."""
    number: int | None = None
    """What it is called in records, where it keeps its name while others come and go; None: ``worker``."""
    num_workers: int = 1
    """How many there are."""
    device: DeviceKind = "cpu"
    """Kind of device."""
    device_index: int = 0
    """Which GPU of the node."""
    threads: int = 1
    """Threads of a CPU device."""
    channels_last: bool = False
    """Whether images and weights lie in channels-last order."""
    precision: Precision = "fp32"
    """``bf16`` and ``fp16`` run forward passes under autocast; with ``fp16`` the loss is scaled."""
    compile: bool = False
    """Whether the model is compiled by ``torch.compile``, for training alone."""
    loader_processes: int = 0
    """Processes that draw samples in the background; 0: the worker itself does."""
    freeze_batch_norm: bool = False
    """Whether batch norm keeps its statistics, scale and shift."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates at the end alone."""
    eval_batch_size: int = 16
    """Images of one evaluation batch."""
    evaluate: bool = True
    """Whether to evaluate at all."""
    overlap: bool = True
    """Whether slices are pushed while backward goes on, where servers share memory with the worker."""
    early_forward: bool = False
    """Whether the next forward pass may begin with the parameters that are there, likewise, and without a vote."""
    step_timeout_s: float = 300.0
    """Deadline of each wait for servers or other workers."""
    profile: ProfileConfig | None = None
    """What it writes a trace of, if anything."""

    @property
    def called(self) -> int:
        """What it is called in records."""
        return self.worker if self.number is None else self.number

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ConfigError(f"workers is {self.num_workers}: at least one device must compute")
        if self.num_workers > self.plan.microbatches:
            raise ConfigError(
                f"{self.num_workers} workers, but only {self.plan.microbatches} microbatches: "
                "raise --microbatches (it should be a power of two) or lower --workers"
            )
        if self.threads < 1:
            raise ConfigError(f"threads is {self.threads}: a device needs at least one thread")
        if self.precision not in get_args(Precision):
            raise ConfigError(f"precision {self.precision!r}: use one of {', '.join(get_args(Precision))}")
