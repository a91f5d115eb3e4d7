"""What a parameter-server run is made of. Imports neither torch nor ray."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from models.options import TaskOptions
from paramserver.config import OptimizerConfig, ServerConfig, WirePrecision
from workers.config import WorkerConfig
from workers.faults import NO_FAULTS, Faults

__all__ = ["ClusterConfig", "Seat", "TransportName"]

TransportName = Literal["auto", "ray"]


class Seat(NamedTuple):
    """A worker's place among those that compute, until the membership changes."""

    number: int
    """What it is called in records."""
    position: int
    """Which run of microbatches it has."""
    of: int
    """How many workers there are."""
    generation: int
    """Of the membership, in which this holds."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Settings of all actors of one run."""

    options: TaskOptions
    """What the task is built from, in every process."""
    worker: WorkerConfig
    """Settings of worker 0; the others differ in their index alone."""
    optimizer: OptimizerConfig
    """The servers' optimizer."""
    servers: ServerConfig
    """How parameters are placed."""
    server_threads: int = 1
    """Threads of each server."""
    transport: TransportName = "auto"
    """``auto`` takes shared memory inside a node and Ray's objects between nodes; ``ray`` takes Ray everywhere."""
    wire_precision: WirePrecision = "fp32"
    """What contributions are rounded to where Ray carries them."""
    arena_dir: str = "/dev/shm"
    """Folder in whose file system shared memory is made."""
    held_versions: tuple[int, ...] = ()
    """Versions that servers keep until a snapshot of them was taken."""
    share_device: bool = False
    """Whether several workers may use one GPU."""
    start_timeout_s: float = 120.0
    """Deadline for all actors to have a place and a model."""
    run: str = "run"
    """Run id and resume count."""
    num_samples: int = 0
    """Size of the training set."""
    spares: int = 1
    """Processes that stand by: on each node with servers, to go on from the memory of one that dies, and on CPUs to
    take the place of a worker."""
    replicas: int = 0
    """1: each server's committed versions are kept on another node, too."""
    min_workers: int = 1
    """With fewer the run waits for replacements, and ends if none come."""
    verify_every: int = 0
    """Steps between versions of which workers compare what they hold with the servers' checksums; 0: never."""
    faults: Faults = NO_FAULTS
    """What is to happen to the run."""
    step_timeout_s: float | None = None
    """Seconds without a step after which somebody is taken for dead; None: 30, or ten median steps if that is more."""
