"""Settings of ``pushpull bench kill``. Imports neither torch nor ray."""

from dataclasses import dataclass

from paramserver.errors import ConfigError

__all__ = ["KillConfig"]


@dataclass(frozen=True, kw_only=True)
class KillConfig:
    """What the loss of one worker is measured with."""

    task: str = "ssd"
    """ssd, fcn, or path/to/file.py:ClassName."""
    workers: int = 2
    """Workers, or ranks."""
    step: int = 15
    """The step after which one worker is killed."""
    steps: int = 60
    """Steps of each run."""
    checkpoint_every: int = 10
    """Steps between checkpoints, of which DDP needs one to go on from."""
    batch_size: int = 8
    """Images of a minibatch."""
    image_size: int | str | None = None
    """Training image size; default: the task's."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def __post_init__(self) -> None:
        if not 0 < self.step < self.steps:
            raise ConfigError(f"--step is {self.step}: the kill must come before the last of {self.steps} steps")
        if self.workers < 2:
            raise ConfigError(f"--workers is {self.workers}: somebody must be left, so it takes 2 or more")
        if not self.checkpoint_every > 0:
            raise ConfigError(f"--checkpoint-every is {self.checkpoint_every}: it must be 1 or more")
