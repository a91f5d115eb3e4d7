"""Detection data in d2l's banana layout: a ``label.csv`` and a folder of images for each split."""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from models.data.detection_sample import detection_sample
from models.data.detection_transforms import DetectionTransform
from models.data.finite import finite
from models.data.images import DecodedImages
from models.errors import DataError, OnError, raise_error, reported
from models.task import Sample, Split

__all__ = ["BananaDetection", "banana_classes"]

_FOLDERS: dict[Split, str] = {"train": "bananas_train", "val": "bananas_val"}
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_COLUMNS = ("img_name", "label", *_CORNERS)
_SUFFIXES = (".jpg", ".jpeg", ".png")


class _Row(NamedTuple):
    where: str
    """File and line, for messages."""
    image: str
    label: int
    corners: tuple[float, float, float, float]
    """In pixels."""


class BananaDetection(Dataset[Sample]):
    """``bananas_train/label.csv`` with columns img_name, label, xmin, ymin, xmax, ymax in pixels, and ``images/``.

    An image may have several rows. Everything but the pixels is read and checked at construction.

    Args:
        root: the folder that holds ``bananas_train`` and ``bananas_val``.
        split: train or val.
        transform: applied to every image and its boxes.
        classes: names of the labels 0, 1, …
        images: keeps what was decoded; None: nothing is kept.
        on_error: is told what is wrong with a row.

    Raises:
        DataError: if a folder, file or column is missing; by ``on_error``, if an image is missing or a row is wrong; it
            names file and line.
    """

    def __init__(
        self,
        root: Path,
        split: Split,
        transform: DetectionTransform,
        classes: tuple[str, ...],
        images: DecodedImages | None = None,
        on_error: OnError = raise_error,
    ) -> None:
        self.classes = classes
        self._transform = transform
        self._decoded = images or DecodedImages()
        folder = root / _FOLDERS[split]
        corners: dict[Path, list[tuple[float, ...]]] = {}
        labels: dict[Path, list[int]] = {}
        sizes: dict[Path, tuple[int, int]] = {}
        listed: set[Path] = set()
        for row in _read_rows(folder / "label.csv", on_error, listed.add):
            with reported(on_error):
                path = folder / "images" / row.image
                if path not in sizes:
                    sizes[path] = _image_size(path, row.where)
                    corners[path], labels[path] = [], []
                _check(row, sizes[path], classes)
                corners[path].append(row.corners)
                labels[path].append(row.label)
        if not listed:
            raise DataError(f"{folder / 'label.csv'} lists no image: add a line for each box")
        self.paths = list(sizes)
        # Arrays: a loader process would get each tensor as a shared file of its own.
        self._boxes: list[NDArray[np.float32]] = [
            (np.array(corners[path]).reshape(-1, 4) / np.array(size * 2)).astype(np.float32)
            for path, size in sizes.items()
        ]
        self._labels: list[NDArray[np.int64]] = [np.array(labels[path], dtype=np.int64) for path in self.paths]
        if on_error is not raise_error:  # training needs nothing that nobody has labelled
            for path in sorted((folder / "images").glob("*")):
                if path.suffix.lower() in _SUFFIXES and path not in listed:
                    on_error(DataError(f"{path} has no line in {folder / 'label.csv'}", "missing annotation"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        image = self._decoded.get(self.paths[index])
        return detection_sample(index, image, self._boxes[index], self._labels[index], self._transform)


def banana_classes(root: Path, on_error: OnError = raise_error) -> tuple[str, ...]:
    """Names ``class0``, ``class1``, … for the labels in the splits that are there; the layout has none of its own.

    Raises:
        DataError: if no split is there or a ``label.csv`` lacks a column; by ``on_error``, if a row is wrong.
    """
    files = [root / folder / "label.csv" for folder in _FOLDERS.values()]
    found = [path for path in files if path.is_file()] or files[:1]
    highest = 0
    for path in found:
        with reported(on_error):  # of the other split something may be known
            highest = max([highest, *(row.label for row in _read_rows(path, on_error))])
    return tuple(f"class{label}" for label in range(highest + 1))


def _read_rows(
    path: Path, on_error: OnError, on_image: Callable[[Path], object] = lambda image: None
) -> Iterator[_Row]:
    """Those that are right; ``on_image`` is told of the images of all."""
    if not path.is_file():
        raise DataError(f"missing {path}: the folder of a banana data set holds {' and '.join(_FOLDERS.values())}")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise DataError(
                f"{path} lacks the column {', '.join(missing)}: its first line must be {','.join(_COLUMNS)}"
            )
        for fields in reader:
            if fields["img_name"]:
                on_image(path.parent / "images" / fields["img_name"])
            try:
                row = _row(fields, f"{path}, line {reader.line_num}")
            except DataError as error:
                on_error(error)
            else:
                yield row


def _row(fields: dict[str, str], where: str) -> _Row:
    try:
        x1, y1, x2, y2 = (finite(fields[name]) for name in _CORNERS)
        return _Row(where, fields["img_name"], int(fields["label"]), (x1, y1, x2, y2))
    except (TypeError, ValueError) as error:  # TypeError: the line is too short
        message = f"{where}: label, {', '.join(_CORNERS)} must be numbers: {error}"
        raise DataError(message, "wrong annotation") from error


def _image_size(path: Path, where: str) -> tuple[int, int]:
    """Width and height from the file's header."""
    if not path.is_file():
        raise DataError(f"{where}: missing image {path}: add the file or remove the line", "missing file")
    try:
        with Image.open(path) as image:
            width, height = image.size
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{where}: broken image {path}: {error}", "broken file") from error
    return width, height


def _check(row: _Row, size: tuple[int, int], classes: tuple[str, ...]) -> None:
    (x1, y1, x2, y2), (width, height) = row.corners, size
    if not 0 <= row.label < len(classes):
        raise DataError(
            f"{row.where}: label {row.label} is not one of 0..{len(classes) - 1}: correct it or name more --classes",
            "unknown label",
        )
    if not (x1 < x2 and y1 < y2):
        raise DataError(
            f"{row.where}: box {row.corners} is empty: xmax must exceed xmin, and ymax ymin", "box without extent"
        )
    if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
        raise DataError(
            f"{row.where}: box {row.corners} leaves its image of {width}x{height} pixels: correct the line",
            "box outside its image",
        )
