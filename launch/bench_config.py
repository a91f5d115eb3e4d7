"""Settings of ``pushpull bench``. Imports neither torch nor ray."""

import shlex
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from launch.config import Backend, Device
from paramserver.errors import ConfigError
from workers.config import Precision

__all__ = ["BenchConfig", "Scaling", "parse_counts"]

Scaling = Literal["weak", "strong"]


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to measure, and how often."""

    workers: str = "1,2"
    """Worker counts, comma-separated."""
    backends: str = "ps,ddp"
    """Backends to measure beside the single-device baseline, comma-separated."""
    repeats: int = 3
    """Interleaved repetitions of every row."""
    steps: int = 6
    """Measured steps of a row, after the warm-up."""
    warmup: int = 2
    """Steps dropped at the start of each row."""
    batch_size: int | None = None
    """Images of one device; weak scaling takes N times as many. Default: 16 for ssd, 4 for fcn, 8 for others."""
    image_size: int | str | None = None
    """Image size in pixels, HxW or one number; default: the task's."""
    model: str | None = None
    """Network, as in pushpull train; default: the task's."""
    servers: int = 1
    """Parameter servers."""
    data: str = "synthetic"
    """As in pushpull train."""
    augment: str | None = None
    """As in pushpull train."""
    loader_processes: int | None = None
    """As in pushpull train, in every row, the baseline included."""
    seed: int = 0
    """As in pushpull train."""
    threads: int = 1
    """Threads of a CPU device, in every row, the baseline included."""
    device: Device = "auto"
    """auto takes GPUs if there are any."""
    share_device: bool = False
    """Allow several workers on one GPU."""
    precision: Precision = "fp32"
    """fp32, bf16 or fp16, in every row."""
    compile: bool = False
    """Compile the network with torch.compile, in every row."""
    channels_last: bool = True
    """Channels-last layout, in every row."""
    scaling: str = "weak,strong"
    """weak (N times the batch), strong (the same batch), or both."""
    equality_steps: int = 3
    """Steps of the equality check that comes first; 0 leaves it out."""
    out: str = "runs"
    """Folder of benchmark folders."""
    name: str | None = None
    """Name of the benchmark's folder; default: bench-<time>."""
    overwrite: bool = False
    """Replace an existing folder."""
    label: str | None = None
    """A remark that stands in the tables, such as 'demo size'."""

    def __post_init__(self) -> None:
        for backend in _parts(self.backends):
            if backend not in get_args(Backend):
                raise ConfigError(
                    f"--backends {self.backends!r}: {backend!r} is none of {', '.join(get_args(Backend))}"
                )
        for kind in _parts(self.scaling):
            if kind not in get_args(Scaling):
                raise ConfigError(f"--scaling {self.scaling!r}: {kind!r} is neither weak nor strong")
        parse_counts(self.workers)
        for name, least in (("repeats", 1), ("steps", 1), ("threads", 1), ("servers", 1), ("batch_size", 1)):
            self._check(name, least)
        for name in ("warmup", "equality_steps", "loader_processes"):
            self._check(name, 0)

    def _check(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}: it must be {least} or more")

    @property
    def worker_counts(self) -> list[int]:
        """Worker counts, ascending."""
        return parse_counts(self.workers)

    @property
    def backend_names(self) -> list[Backend]:
        """Backends, each once: single, ps, ddp."""
        return [name for name in get_args(Backend) if name in _parts(self.backends)]

    @property
    def scalings(self) -> list[Scaling]:
        """Kinds of scaling, weak first."""
        return [kind for kind in get_args(Scaling) if kind in _parts(self.scaling)]

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, plain values."""
        return asdict(self)

    def command(self, tasks: list[str]) -> str:
        """The command line that gives these settings."""
        words = ["pushpull", "bench", *tasks]
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            option = f"--{field.name.replace('_', '-')}"
            words += [option] if value is True else [option, str(value).lower() if value is False else str(value)]
        return shlex.join(words)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def parse_counts(text: str) -> list[int]:
    """``1,2,4`` as numbers, ascending.

    Raises:
        ConfigError: for anything else.
    """
    parts = _parts(str(text))
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"--workers {text!r} is not a list of counts such as 1,2,4")
    return sorted({int(part) for part in parts})
