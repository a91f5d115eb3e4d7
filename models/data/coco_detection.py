"""Detection data in COCO's layout: a JSON file of instances for each split, and a folder of images."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

from models.data.detection_sample import detection_sample
from models.data.detection_transforms import DetectionTransform
from models.data.finite import finite
from models.data.images import DecodedImages
from models.data.left_out import warn_left_out
from models.errors import DataError, OnError, raise_error, reported
from models.task import Sample

__all__ = ["CocoDetection", "coco_classes"]

_TOLERANCE = 1.0  # pixels by which a box may leave its image: annotations are rounded


class _ImageRow(NamedTuple):
    file: str
    size: tuple[float, float]
    """Width and height in pixels."""


class _Object(NamedTuple):
    corners: tuple[float, ...]
    label: int
    crowd: bool
    polygons: tuple[tuple[float, ...], ...]
    """x, y, x, y, … in pixels."""


class CocoDetection(Dataset[Sample]):
    """``annotations/instances_SPLIT.json`` and the images in ``SPLIT/``, or in ``images/SPLIT/``.

    Annotations are read and checked at construction. A crowd is no object: nobody is trained on it, and a metric does
    not ask for it (``difficult``). Boxes without width or height are left out with a warning.

    Args:
        root: the folder that holds ``annotations``.
        split: such as ``train2017``; ``train`` finds the only one that begins so.
        transform: applied to every image and its boxes.
        classes: names of the labels 0, 1, …: categories of the file.
        images: keeps what was decoded; None: nothing is kept.
        on_error: is told what is wrong with an image's row or an annotation.
        crowds: whether crowds are given, as boxes that are difficult; not for training.
        masks: whether the target has ``masks`` of the objects' polygons, too; crowds have none.

    Raises:
        DataError: if a file or folder is missing; by ``on_error``, if an annotation is wrong; it names the file.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        transform: DetectionTransform,
        classes: tuple[str, ...],
        images: DecodedImages | None = None,
        on_error: OnError = raise_error,
        *,
        crowds: bool,
        masks: bool = False,
    ) -> None:
        self.classes = classes
        self._transform = transform
        self._decoded = images or DecodedImages()
        path, content = _read(root, split)
        labels = _labels(path, content, classes, on_error)
        rows = _images(path, content, on_error)
        folder = _image_folder(root, path)
        self.paths = [folder / row.file for row in rows.values()]
        found: dict[int, list[_Object]] = {image: [] for image in rows}
        empty: list[str] = []
        for row in content["annotations"]:
            where = f"{path}, annotation {row.get('id')}"
            with reported(on_error):
                image, category, box, crowd = _annotation(row, where)
                if (crowd and not crowds) or category not in labels:  # the category was told of
                    continue
                if image not in found:
                    raise DataError(f"{where}: there is no image {image}", "wrong annotation")
                corners = _corners(box, rows[image].size, where)
                if corners is None:
                    empty.append(f"{where}: bbox {box}")
                else:
                    polygons = _polygons(row.get("segmentation"), where) if masks and not crowd else ()
                    found[image].append(_Object(corners, labels[category], crowd, polygons))
        warn_left_out(f"{path}: left out {len(empty)} box(es) without width or height", empty, on_error)
        # Arrays: a loader process would get each tensor as a shared file of its own.
        objects = list(found.values())
        self._boxes: list[NDArray[np.float32]] = [
            np.array([item.corners for item in row], dtype=np.float32).reshape(-1, 4) for row in objects
        ]
        self._labels: list[NDArray[np.int64]] = [
            np.array([item.label for item in row], dtype=np.int64) for row in objects
        ]
        self._difficult: list[NDArray[np.bool_]] = [
            np.array([item.crowd for item in row], dtype=np.bool_) for row in objects
        ]
        self._polygons = [[item.polygons for item in row] for row in objects] if masks else None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        image, boxes, labels = self._decoded.get(self.paths[index]), self._boxes[index], self._labels[index]
        masks = None if self._polygons is None else _draw(self._polygons[index], *image.shape[-2:])
        return detection_sample(index, image, boxes, labels, self._transform, self._difficult[index], masks)


def _polygons(segmentation: Any, where: str) -> tuple[tuple[float, ...], ...]:
    try:
        polygons = tuple(tuple(finite(value) for value in polygon) for polygon in segmentation)
        if not polygons or any(len(polygon) < 6 or len(polygon) % 2 for polygon in polygons):
            raise ValueError("three points or more, x and y each")
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: segmentation must be polygons: {error}", "wrong annotation") from error
    return polygons


def _draw(objects: Sequence[tuple[tuple[float, ...], ...]], height: int, width: int) -> Tensor:
    """(G, height, width) bool: the pixels inside an object's polygons."""
    masks = np.zeros((len(objects), height, width), dtype=np.bool_)
    for place, polygons in enumerate(objects):
        canvas = Image.new("1", (width, height))
        for polygon in polygons:
            ImageDraw.Draw(canvas).polygon(polygon, fill=1)
        masks[place] = np.array(canvas)
    return torch.from_numpy(masks)


def coco_classes(root: Path, split: str) -> tuple[str, ...]:
    """Names of a split's categories, in the order of their ids.

    Raises:
        DataError: if the file is missing or wrong.
    """
    return tuple(_names(*_read(root, split)).values())


def _read(root: Path, split: str) -> tuple[Path, dict[str, Any]]:
    folder = root / "annotations"
    path = folder / f"instances_{split}.json"
    if not path.is_file():
        others = sorted(folder.glob("instances_*.json"))
        alike = [other for other in others if other.stem.startswith(f"instances_{split}")]
        if len(alike) != 1:
            names = ", ".join(other.stem.removeprefix("instances_") for other in others) or "none"
            raise DataError(f"missing {path}: splits there: {names}; choose with --split-train and --split-val")
        (path,) = alike
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in ("images", "annotations", "categories") if not isinstance(content[name], list)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a file of COCO instances: {type(error).__name__}: {error}") from error
    if missing:
        raise DataError(f"{path}: {', '.join(missing)} must be lists")
    return path, content


def _image_folder(root: Path, path: Path) -> Path:
    split = path.stem.removeprefix("instances_")
    for folder in (root / split, root / "images" / split, root / "images"):
        if folder.is_dir():
            return folder
    raise DataError(f"missing {root / split}: the images of {path.name}")


def _names(path: Path, content: dict[str, Any]) -> dict[int, str]:
    """Of the categories, in the order of their ids."""
    try:
        return {row["id"]: row["name"] for row in sorted(content["categories"], key=lambda row: int(row["id"]))}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: a category needs id and name: {type(error).__name__}: {error}") from error


def _images(path: Path, content: dict[str, Any], on_error: OnError) -> dict[int, _ImageRow]:
    """Rows by id, in its order."""
    rows: dict[int, _ImageRow] = {}
    for place, row in enumerate(content["images"]):
        try:
            size = (finite(row["width"]), finite(row["height"]))
            if min(size) <= 0:
                raise ValueError(f"{row['width']}x{row['height']} pixels")
            rows[int(row["id"])] = _ImageRow(str(row["file_name"]), size)
        except (KeyError, TypeError, ValueError) as error:
            message = f"{path}, image {place}: needs id, file_name, width and height: {type(error).__name__}: {error}"
            on_error(DataError(message, "wrong annotation"))
    return dict(sorted(rows.items()))


def _annotation(row: dict[str, Any], where: str) -> tuple[int, int, Any, bool]:
    """Image, category, box, and whether it is a crowd."""
    try:
        return row["image_id"], row["category_id"], row["bbox"], bool(row.get("iscrowd", 0))
    except KeyError as error:
        raise DataError(f"{where}: lacks {error}", "wrong annotation") from error


def _labels(path: Path, content: dict[str, Any], classes: tuple[str, ...], on_error: OnError) -> dict[int, int]:
    """Label of each category that is used."""
    names = _names(path, content)
    used = {row["category_id"] for row in content["annotations"] if "category_id" in row}
    labels: dict[int, int] = {}
    for category in sorted(used, key=str):
        name = names.get(category)
        if name in classes:
            labels[category] = classes.index(name)
        else:
            message = f"{path}: category {category} ({name!r}) is not one of the {len(classes)} classes: "
            on_error(DataError(f"{message}add it to --classes", "unknown label"))
    return labels


def _corners(box: Any, size: tuple[float, float], where: str) -> tuple[float, float, float, float] | None:
    """Corners as parts of width and height from x, y, width and height in pixels; None of a box without extent."""
    try:
        x, y, w, h = (finite(value) for value in box)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: bbox {box!r} must be x, y, width, height: {error}", "wrong annotation") from error
    width, height = size
    if min(x, y) < -_TOLERANCE or x + w > width + _TOLERANCE or y + h > height + _TOLERANCE:
        raise DataError(
            f"{where}: bbox {box} leaves its image of {width:.0f}x{height:.0f} pixels", "box outside its image"
        )
    x1, y1, x2, y2 = max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)
    if x2 <= x1 or y2 <= y1:
        return None
    return x1 / width, y1 / height, x2 / width, y2 / height
