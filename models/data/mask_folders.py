"""Segmentation data as two folders, images and masks, with a table that says what a mask's values or colours mean."""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from models.data.images import DecodedImages
from models.data.segmentation_transforms import SegmentationTransform
from models.data.voc_classes import VOID
from models.errors import DataError, OnError, raise_error
from models.task import Sample, Split

__all__ = ["LabelTable", "MaskFolders", "read_label_table"]

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_TABLE = "classes.csv"
_VOID_NAMES = ("void", "ignore", "unlabelled", "unlabeled")


class LabelTable(NamedTuple):
    """What the values of a mask mean."""

    names: tuple[str, ...]
    """By label."""
    ids: dict[int, int]
    """From a greyscale or palette mask's values to labels; empty if masks are coloured."""
    colours: dict[tuple[int, int, int], int]
    """From a coloured mask's pixels to labels; empty if masks hold values."""


def read_label_table(root: Path) -> LabelTable:
    """Read ``classes.csv``: columns ``name`` and ``id``, or ``name``, ``r``, ``g`` and ``b``.

    Names are labels 0, 1, … in their order, and several rows of one name are one class; what is named void, ignore or
    unlabelled is what nobody labelled.

    Raises:
        DataError: if the file is missing or wrong; it names the line.
    """
    path = root / _TABLE
    if not path.is_file():
        raise DataError(f"missing {path}: a line name,id or name,r,g,b for each class says what masks hold")
    names: list[str] = []
    ids: dict[int, int] = {}
    colours: dict[tuple[int, int, int], int] = {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        fields = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = fields
        if "name" not in fields or not ("id" in fields or {"r", "g", "b"} <= set(fields)):
            raise DataError(f"{path}: its first line must be name,id or name,r,g,b, not {','.join(fields)}")
        for row in reader:
            name = (row["name"] or "").strip()
            void = name.lower() in _VOID_NAMES
            if not void and name not in names:
                names.append(name)
            label = VOID if void else names.index(name)
            before = len(ids) + len(colours)
            try:
                if "id" in fields:
                    ids.setdefault(int(row["id"]), label)
                else:
                    colours.setdefault((int(row["r"]), int(row["g"]), int(row["b"])), label)
            except (TypeError, ValueError) as error:
                raise DataError(
                    f"{path}, line {reader.line_num}: what is not the name must be numbers: {error}"
                ) from error
            if len(ids) + len(colours) == before:
                raise DataError(f"{path}, line {reader.line_num}: another line has the same id or colour")
    if not 1 < len(names) < VOID:
        raise DataError(f"{path} names {len(names)} classes: 2 to {VOID - 1} can be told apart")
    return LabelTable(tuple(names), ids, colours)


class MaskFolders(Dataset[Sample]):
    """``ROOT/SPLIT/images`` and ``ROOT/SPLIT/masks`` with files of equal stems, and ``ROOT/classes.csv``.

    Args:
        root: the folder that holds ``train`` and ``val``.
        split: train or val.
        table: what masks hold.
        transform: applied to every image and its mask.
        images: keeps what was decoded; None: nothing is kept.
        on_error: is told which image has no mask.

    Raises:
        DataError: if a folder is missing; by ``on_error``, if an image has no mask.
    """

    def __init__(
        self,
        root: Path,
        split: Split,
        table: LabelTable,
        transform: SegmentationTransform,
        images: DecodedImages | None = None,
        on_error: OnError = raise_error,
    ) -> None:
        files, masks = (_files(root / split / name) for name in ("images", "masks"))
        for stem in sorted(files.keys() - masks.keys()):
            on_error(DataError(f"{files[stem]} has no mask in {root / split / 'masks'}", "missing annotation"))
        if on_error is not raise_error:  # training does not look for them
            for stem in sorted(masks.keys() - files.keys()):
                on_error(DataError(f"{masks[stem]} has no image in {root / split / 'images'}", "missing file"))
        stems = sorted(files.keys() & masks.keys())
        self.paths = [files[stem] for stem in stems]
        self._masks = [masks[stem] for stem in stems]
        self._table = table
        self._transform = transform
        self._decoded = images or DecodedImages()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``; its target ``mask`` is (H, W) uint8.

        Raises:
            DataError: if a file is broken, the mask's size is not the image's, or it holds what the table does not.
        """
        image = self._decoded.get(self.paths[index])
        mask = self._decoded.get(self._masks[index], self._read)
        if mask.shape != image.shape[1:]:
            raise DataError(
                f"{self._masks[index]} has {mask.shape[0]}x{mask.shape[1]} pixels, its image "
                f"{image.shape[1]}x{image.shape[2]}: they must be equal",
                "mask of another size",
            )
        return Sample(*self._transform(image, mask), index)

    def _read(self, path: Path) -> Tensor:
        """From what the file holds to (H, W) uint8 labels."""
        try:
            with Image.open(path) as file:
                coloured = bool(self._table.colours)
                if not coloured and file.mode not in ("P", "L", "I;16", "I"):
                    raise DataError(
                        f"{path} has mode {file.mode}, but {_TABLE} has ids: give colours r,g,b instead",
                        "wrong annotation",
                    )
                pixels = np.array(file.convert("RGB") if coloured else file).astype(np.int64)
        except (OSError, SyntaxError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"broken mask: {path}: {error}", "broken file") from error
        known: dict[int, int] = self._table.ids
        if coloured:
            pixels = (pixels[..., 0] << 16) + (pixels[..., 1] << 8) + pixels[..., 2]
            known = {(r << 16) + (g << 8) + b: label for (r, g, b), label in self._table.colours.items()}
        values, inverse = np.unique(pixels, return_inverse=True)
        foreign = [int(value) for value in values if int(value) not in known]
        if foreign:
            shown = f"#{foreign[0]:06x}" if coloured else str(foreign[0])
            raise DataError(
                f"{path} holds {'colour ' if coloured else ''}{shown}, which {_TABLE} does not name", "unknown label"
            )
        labels = np.array([known[int(value)] for value in values], dtype=np.uint8)
        return torch.from_numpy(labels[inverse].reshape(pixels.shape))


def _files(folder: Path) -> dict[str, Path]:
    """Images of a folder by stem."""
    if not folder.is_dir():
        raise DataError(f"missing {folder}: ROOT/train and ROOT/val hold images/ and masks/")
    found = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in _SUFFIXES}
    if not found:
        raise DataError(f"{folder} holds no image ({', '.join(_SUFFIXES)})")
    return found
