"""``pushpull predict``: pictures with a trained run's predictions drawn in."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from launch.trained import Trained, open_trained
from models.pictures import read_image, write_image
from models.task import Batch, Drawable
from paramserver.errors import ConfigError

__all__ = ["predict_images"]


def predict_images(run: str, images: Sequence[str], *, out: str | None, threads: int | None) -> list[Path]:
    """Predict on image files and draw the predictions into copies of them.

    Args:
        run: run folder (its newest checkpoint counts), or ``checkpoints/step_N`` in it.
        images: image files of any size.
        out: folder of the pictures; default: ``predictions`` in the run folder.
        threads: other threads than the run's.

    Returns:
        The pictures written, ``<stem>.png``, in the order of ``images``.

    Raises:
        ConfigError, CheckpointError: see ``open_trained``; also if the task cannot draw, or ``out`` cannot be written.
        models.errors.DataError: if an image cannot be read; nothing is written then.
    """
    trained = open_trained(run, threads=threads)
    task = trained.task
    if not isinstance(task, Drawable):
        raise ConfigError(
            f"task {task.name} does not draw: give its class the methods prepare and draw of models.task.Drawable"
        )
    paths = [Path(image).expanduser() for image in images]
    for path in paths:
        read_image(path)  # all of them first, so that a broken one leaves no half of a set
    folder = Path(out).expanduser() if out is not None else trained.folder.path / "predictions"
    with _writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    targets = _targets(folder, paths)
    for path, target in zip(paths, targets, strict=True):
        picture = _draw(trained, task, read_image(path))
        with _writing_to(folder):
            write_image(picture, target)
    return targets


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--out: cannot write to {folder} ({error.strerror}): choose another place") from error


def _targets(folder: Path, paths: Sequence[Path]) -> list[Path]:
    """``<stem>.png`` for each path, or ``<stem>-2.png`` where that is taken: by another one, or by an input itself."""
    taken = {path.resolve() for path in paths}
    targets = []
    for path in paths:
        target, count = folder / f"{path.stem}.png", 1
        while target.resolve() in taken:
            count += 1
            target = folder / f"{path.stem}-{count}.png"
        taken.add(target.resolve())
        targets.append(target)
    return targets


def _draw(trained: Trained, task: Drawable, image: Tensor) -> Tensor:
    """A (3, H, W) uint8 picture with the prediction drawn in."""
    batch = Batch(task.prepare(image)[None], {}, torch.zeros(1, dtype=torch.int64))
    worker, device = trained.worker, trained.replica.device
    with (
        trained.replica.evaluating() as model,
        torch.autocast(device.type, dtype=torch.bfloat16, enabled=worker.precision == "bf16"),
    ):
        outputs = trained.task.predict(model, batch.to(device, channels_last=worker.channels_last))
    return task.draw(image, outputs, 0)
