"""Settings of ``pushpull data check`` and ``data show``. Imports neither torch nor ray."""

from dataclasses import dataclass

from paramserver.errors import ConfigError

__all__ = ["DataConfig", "task_of"]

_TASKS = {"banana": "ssd", "voc": "ssd", "coco": "ssd", "masks": "fcn", "folder": "classify", "cifar10": "classify"}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data, and how it is looked at."""

    task: str | None = None
    """ssd, fcn, rcnn, classify, or path/to/file.py:ClassName; default: the task that such data is for, ssd for voc."""
    model: str | None = None
    """As in pushpull train: it may say how images are scaled and varied."""
    classes: str | None = None
    """As in pushpull train."""
    split_train: str = "train"
    """As in pushpull train."""
    split_val: str = "val"
    """As in pushpull train."""
    image_size: int | str | None = None
    """As in pushpull train."""
    augment: str | None = None
    """As in pushpull train."""
    recipe: str = "default"
    """As in pushpull train."""
    seed: int = 0
    """As in pushpull train: a sample is varied by seed, epoch and its number alone."""
    epoch: int = 0
    """Of which epoch data show draws the training images."""
    download: bool = False
    """As in pushpull train: fetch cifar10:PATH and voc:PATH (2012) if they are not there."""
    images: int = 16
    """Images on the sheet."""
    out: str = "contact-sheet.png"
    """Picture that is written."""

    def __post_init__(self) -> None:
        if not self.out.lower().endswith(".png"):
            raise ConfigError(f"--out {self.out}: a PNG is written, so its name must end in .png")
        for name, least in (("images", 1), ("epoch", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name} is {getattr(self, name)}: it must be {least} or more")


def task_of(spec: str) -> str:
    """The task that data of this kind is for.

    Raises:
        ConfigError: if nothing is known of the kind.
    """
    kind = spec.partition(":")[0]
    if kind not in _TASKS:
        raise ConfigError(f"{spec!r}: use one of {', '.join(f'{name}:PATH' for name in _TASKS)}, or say --task")
    return _TASKS[kind]
