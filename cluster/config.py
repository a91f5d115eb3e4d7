"""What a parameter-server run is made of. Imports neither torch nor ray."""

from dataclasses import dataclass
from typing import Literal

from models.options import TaskOptions
from paramserver.config import OptimizerConfig, ServerConfig, WirePrecision
from workers.config import WorkerConfig

__all__ = ["ClusterConfig", "TransportName"]

TransportName = Literal["auto", "ray"]


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
