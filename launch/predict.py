"""``pushpull predict``: pictures with a trained run's predictions drawn in, beside what is known where something is."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from launch.trained import Trained, open_trained
from models.pictures import beside, read_image, write_image
from models.task import Batch, Drawable, Outputs, Sample, Showable
from paramserver.errors import ConfigError

__all__ = ["compare_with_truth", "predict_images", "predict_validation"]


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
    task = _drawable(trained)
    paths = [Path(image).expanduser() for image in images]
    for path in paths:
        read_image(path)  # all of them first, so that a broken one leaves no half of a set
    folder = _folder(trained, out)
    targets = _targets(folder, paths)
    for path, target in zip(paths, targets, strict=True):
        picture = _draw(trained, task, read_image(path))
        with _writing_to(folder):
            write_image(picture, target)
    return targets


def predict_validation(run: str, number: int, *, out: str | None, threads: int | None) -> list[Path]:
    """Predict on the first images of the run's validation split, and draw each beside what is known of it.

    Args:
        run: see ``predict_images``.
        number: how many images at most.
        out: see ``predict_images``.
        threads: see ``predict_images``.

    Returns:
        The pictures written, ``val-<index>.png``.

    Raises:
        ConfigError, CheckpointError: see ``predict_images``; also if the task shows no samples.
    """
    trained = open_trained(run, threads=threads)
    _drawable(trained)
    if not isinstance(trained.task, Showable):
        raise ConfigError(f"task {trained.task.name} shows no samples of its own: name image files")
    compared = compare_with_truth(trained, number)
    folder, written = _folder(trained, out), []
    for sample, known, predicted in compared:
        written.append(folder / f"val-{sample.id:05d}.png")
        with _writing_to(folder):
            write_image(beside(known, predicted), written[-1])
    return written


def compare_with_truth(trained: Trained, number: int) -> Iterator[tuple[Sample, Tensor, Tensor]]:
    """The first validation samples, each with two pictures: what is known drawn in, and what is predicted.

    Raises:
        models.errors.DataError: now, if there is no such split.
    """
    task = trained.task
    assert isinstance(task, Showable)
    assert isinstance(task, Drawable)
    dataset = task.build_dataset("val")

    def compared(sample: Sample) -> tuple[Sample, Tensor, Tensor]:
        outputs = _predict(trained, trained.task.collate([sample]))
        return sample, task.show(sample), task.draw(task.restore(sample.image), outputs, 0)

    return (compared(dataset[index]) for index in range(min(number, len(dataset))))  # type: ignore[arg-type]


def _drawable(trained: Trained) -> Drawable:
    task = trained.task
    if not isinstance(task, Drawable):
        raise ConfigError(
            f"task {task.name} does not draw: give its class the methods prepare and draw of models.task.Drawable"
        )
    return task


def _folder(trained: Trained, out: str | None) -> Path:
    folder = Path(out).expanduser() if out is not None else trained.folder.path / "predictions"
    with _writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


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
    return task.draw(image, _predict(trained, batch), 0)


def _predict(trained: Trained, batch: Batch) -> Outputs:
    worker, device = trained.worker, trained.replica.device
    with (
        trained.replica.evaluating() as model,
        torch.autocast(device.type, dtype=torch.bfloat16, enabled=worker.precision == "bf16"),
    ):
        return trained.task.predict(model, batch.to(device, channels_last=worker.channels_last))
