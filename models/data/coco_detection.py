"""Detection data in COCO's layout: a JSON file of instances for each split, and a folder of images."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from models.data.detection_sample import detection_sample
from models.data.detection_transforms import DetectionTransform
from models.data.images import DecodedImages
from models.errors import DataError
from models.task import Sample

__all__ = ["CocoDetection", "coco_classes"]

_TOLERANCE = 1.0  # pixels by which a box may leave its image: annotations are rounded


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
        crowds: whether crowds are given, as boxes that are difficult; not for training.

    Raises:
        DataError: if a file or folder is missing, or an annotation is wrong; it names the file.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        transform: DetectionTransform,
        classes: tuple[str, ...],
        images: DecodedImages | None = None,
        *,
        crowds: bool,
    ) -> None:
        self.classes = classes
        self._transform = transform
        self._decoded = images or DecodedImages()
        path, content = _read(root, split)
        labels = _labels(path, content, classes)
        rows = sorted(content["images"], key=lambda image: int(image["id"]))
        folder = _image_folder(root, path)
        self._paths = [folder / image["file_name"] for image in rows]
        found: dict[int, list[tuple[tuple[float, ...], int, bool]]] = {int(image["id"]): [] for image in rows}
        sizes = {int(image["id"]): (float(image["width"]), float(image["height"])) for image in rows}
        empty = 0
        for row in content["annotations"]:
            crowd = bool(row.get("iscrowd", 0))
            if crowd and not crowds:
                continue
            where = f"{path}, annotation {row.get('id')}"
            if row["image_id"] not in found:
                raise DataError(f"{where}: there is no image {row['image_id']}")
            corners = _corners(row["bbox"], sizes[row["image_id"]], where)
            if corners is None:
                empty += 1
                continue
            found[row["image_id"]].append((corners, labels[row["category_id"]], crowd))
        if empty:
            warnings.warn(f"{path}: left out {empty} box(es) without width or height", stacklevel=2)
        # Arrays: a loader process would get each tensor as a shared file of its own.
        objects = list(found.values())
        self._boxes: list[NDArray[np.float32]] = [
            np.array([corners for corners, _, _ in row], dtype=np.float32).reshape(-1, 4) for row in objects
        ]
        self._labels: list[NDArray[np.int64]] = [
            np.array([label for _, label, _ in row], dtype=np.int64) for row in objects
        ]
        self._difficult: list[NDArray[np.bool_]] = [
            np.array([crowd for *_, crowd in row], dtype=np.bool_) for row in objects
        ]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Sample:
        image, boxes, labels = self._decoded.get(self._paths[index]), self._boxes[index], self._labels[index]
        return detection_sample(index, image, boxes, labels, self._transform, self._difficult[index])


def coco_classes(root: Path, split: str) -> tuple[str, ...]:
    """Names of a split's categories, in the order of their ids.

    Raises:
        DataError: if the file is missing or wrong.
    """
    _, content = _read(root, split)
    return tuple(row["name"] for row in sorted(content["categories"], key=lambda row: int(row["id"])))


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


def _labels(path: Path, content: dict[str, Any], classes: tuple[str, ...]) -> dict[int, int]:
    """Label of each category that is used."""
    names = {row["id"]: row["name"] for row in content["categories"]}
    used = {row["category_id"] for row in content["annotations"]}
    for category in sorted(used, key=str):
        if names.get(category) not in classes:
            raise DataError(
                f"{path}: category {category} ({names.get(category)!r}) is not one of the {len(classes)} classes: "
                "add it to --classes"
            )
    return {category: classes.index(names[category]) for category in used}


def _corners(box: Any, size: tuple[float, float], where: str) -> tuple[float, float, float, float] | None:
    """Corners as parts of width and height from x, y, width and height in pixels; None of a box without extent."""
    try:
        x, y, w, h = (float(value) for value in box)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: bbox {box!r} must be x, y, width, height: {error}") from error
    width, height = size
    if min(x, y) < -_TOLERANCE or x + w > width + _TOLERANCE or y + h > height + _TOLERANCE:
        raise DataError(f"{where}: bbox {box} leaves its image of {width:.0f}x{height:.0f} pixels")
    x1, y1, x2, y2 = max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)
    if x2 <= x1 or y2 <= y1:
        return None
    return x1 / width, y1 / height, x2 / width, y2 / height
