"""Settings of ``pushpull bench sync``. Imports neither torch nor ray."""

import shlex
from dataclasses import dataclass, fields

from cluster.config import TransportName
from paramserver.errors import ConfigError

__all__ = ["SyncConfig"]


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    """What one round of synchronisation is measured with."""

    params: str = "fcn"
    """Whose parameters: ssd, fcn, path/to/file.py:ClassName, or a size in MB."""
    workers: int = 4
    """Workers, one process each."""
    servers: int = 1
    """Parameter servers."""
    server_threads: int | None = None
    """Threads of each server; default: the cores that waiting workers leave idle."""
    rounds: int = 50
    """Measured rounds of each contestant, in five interleaved blocks."""
    momentum: float = 0.9
    """Of the SGD that everybody takes."""
    weight_decay: float = 0.0
    """Of the SGD that everybody takes."""
    slice_bytes: int = 1 << 20
    """Largest slice of the parameters in bytes."""
    transport: TransportName = "auto"
    """auto (shared memory) or ray."""
    arena_dir: str = "/dev/shm"
    """Folder in whose file system shared memory is made."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def __post_init__(self) -> None:
        for name in ("workers", "servers", "rounds", "server_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}: it must be 1 or more")
        if self.megabytes is not None and not 0 < self.megabytes < 1e6:
            raise ConfigError(f"--params {self.params}: a size in MB must be above 0")

    @property
    def megabytes(self) -> float | None:
        """The size, if ``params`` is one."""
        try:
            return float(self.params)
        except ValueError:
            return None

    def command(self) -> str:
        """The command line that gives these settings."""
        words = ["pushpull", "bench", "sync"]
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default or field.name in ("params", "workers"):
                words += [f"--{field.name.replace('_', '-')}"] + ([] if value is True else [str(value)])
        return shlex.join(words)
