"""``pushpull data check`` and ``data show``: what is in a data set, and what training sees of it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from torch import Tensor

from launch.config import RunConfig
from launch.data_config import DataConfig, task_of
from launch.downloads import download_data
from launch.resolve import task_options, usage_errors
from models.errors import DataError
from models.pictures import contact_sheet, write_image
from models.registry import build_task, read_task
from models.task import Sample, Showable, Split, Task
from paramserver.errors import ConfigError
from workers.samples import SeededDataset

__all__ = ["Checked", "check_data", "show_data"]

_EXAMPLES = 3
_UNSEEN = 8


@dataclass
class Checked:
    """What one split holds."""

    split: Split
    images: int = 0
    """That could be read."""
    counts: Counter[str] = field(default_factory=Counter)
    """Objects, pixels or images of each class."""
    classes: tuple[str, ...] = ()
    """Names of those that there are, where the task tells."""
    wrong: dict[str, list[str]] = field(default_factory=dict)
    """What is wrong, by kind."""
    pictures: list[Tensor] = field(default_factory=list)
    """Of images from all over it."""

    def note(self, error: DataError) -> None:
        """Something is wrong."""
        self.wrong.setdefault(error.kind, []).append(str(error))

    def lines(self) -> Iterator[str]:
        """The report, a few lines."""
        counts = ", ".join(f"{name} {count}" for name, count in self.counts.most_common()) or "nothing labelled"
        yield f"{self.split}: {self.images} images; {counts}"
        unseen = [name for name in self.classes if not self.counts[name]]
        if self.images and unseen:
            more = f" and {len(unseen) - _UNSEEN} more" if len(unseen) > _UNSEEN else ""
            yield f"  nothing of {', '.join(unseen[:_UNSEEN])}{more}"
        for kind, messages in self.wrong.items():
            yield f"  {len(messages)} x {kind}"
            yield from (f"    {message}" for message in messages[:_EXAMPLES])
            if len(messages) > _EXAMPLES:
                yield f"    and {len(messages) - _EXAMPLES} more"


def check_data(spec: str, config: DataConfig) -> list[Checked]:
    """Read every image and annotation of both splits once, and draw some with what is known of them.

    Args:
        spec: as ``--data``.
        config: the rest.

    Returns:
        What each split holds; ``config.out`` was written if there is any image.

    Raises:
        ConfigError: if there is no such data, the task cannot show samples, or the picture cannot be written.
    """
    with usage_errors():
        task = _task(spec, config, augment="none")
    found = [_check(task, split, config.images) for split in get_args(Split)]
    _write([picture for checked in found for picture in checked.pictures][: config.images], config.out)
    return found


def _check(task: Showable, split: Split, images: int) -> Checked:
    checked = Checked(split)
    try:
        dataset = task.build_dataset(split, checked.note)
    except DataError as error:  # of the whole split
        checked.note(error)
        return checked
    length = len(dataset)  # type: ignore[arg-type]
    for index in range(length):
        try:
            sample: Sample = dataset[index]
        except DataError as error:
            checked.note(error)
            continue
        checked.images += 1
        checked.counts.update(task.count(sample))
        if index * images >= len(checked.pictures) * length:  # from all over the data set: it may be sorted by class
            checked.pictures.append(task.show(sample))
    classes = getattr(task, "classes", ())
    if isinstance(classes, tuple | list):  # what a user's own task means by it is its own affair
        checked.classes = tuple(map(str, classes))
    return checked


def show_data(spec: str, config: DataConfig) -> Path:
    """Draw training images as the model gets them, varied as ``config.augment`` says, from all over the data set.

    Args:
        spec: as ``--data``.
        config: the rest.

    Returns:
        The picture written.

    Raises:
        ConfigError: if there is no such data, the task cannot show samples, or the picture cannot be written.
    """
    with usage_errors():
        task = _task(spec, config, augment=config.augment)
        dataset = task.build_dataset("train")
    drawn, length = SeededDataset(dataset, config.seed), len(dataset)  # type: ignore[arg-type]
    count = min(config.images, length)
    chosen = [number * length // count for number in range(count)]  # from all over: it may be sorted by class
    return _write([task.show(drawn[config.epoch, index]) for index in chosen], config.out)


def _task(spec: str, config: DataConfig, *, augment: str | None) -> Showable:
    if config.download:
        download_data(spec)
    shared = ("model", "classes", "split_train", "split_val", "image_size", "recipe", "seed")
    options = task_options(RunConfig(data=spec, augment=augment, **{name: getattr(config, name) for name in shared}))
    task: Task = build_task(read_task(config.task or task_of(spec)), options)
    if not isinstance(task, Showable):
        raise ConfigError(f"task {task.name} shows no samples: give its class the methods of models.task.Showable")
    return task


def _write(pictures: Sequence[Tensor], out: str) -> Path:
    path = Path(out).expanduser()
    if pictures:
        try:
            write_image(contact_sheet(pictures), path)
        except OSError as error:
            raise ConfigError(f"--out {path}: cannot be written ({error.strerror}): choose another place") from error
    return path
