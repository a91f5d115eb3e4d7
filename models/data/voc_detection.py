"""Detection data in Pascal VOC's layout."""

import xml.etree.ElementTree as ET
from collections.abc import Sequence
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
from models.data.left_out import warn_left_out
from models.data.voc_classes import VOC_CLASSES, find_voc_root
from models.errors import DataError, OnError, raise_error, reported
from models.task import Sample

__all__ = ["VOCDetection", "voc_classes"]

_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
_TOLERANCE = 1.0  # pixels by which a box may leave its image: tools differ on whether the first pixel is 0 or 1


class _Object(NamedTuple):
    name: str
    corners: tuple[float, float, float, float]
    """xmin, ymin, xmax, ymax as in the file: the first pixel is 1, and xmax belongs to the box."""
    difficult: bool


class VOCDetection(Dataset[Sample]):
    """``JPEGImages``, ``Annotations`` and ``ImageSets/Main``.

    Objects marked as difficult are trained on, as in SSD's own code, and marked in ``difficult``, (G,) bool, since a
    metric does not ask for them.

    Everything but the pixels is read and checked at construction. A box of a single point is left out with a warning.

    Args:
        root: as ``find_voc_root`` takes it.
        split: name of a file in ``ImageSets/Main``, without ``.txt``.
        transform: applied to every image and its boxes.
        classes: names of the labels 0, 1, …
        images: keeps what was decoded; None: nothing is kept.
        on_error: is told what is wrong with an image, an annotation or an object.

    Raises:
        DataError: if a folder or list is missing; by ``on_error``, if an annotation or image is missing or wrong; it
            names the file.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        transform: DetectionTransform,
        classes: tuple[str, ...],
        images: DecodedImages | None = None,
        on_error: OnError = raise_error,
    ) -> None:
        self.classes = classes
        self._transform = transform
        self._decoded = images or DecodedImages()
        self.paths: list[Path] = []
        # Arrays: a loader process would get each tensor as a shared file of its own.
        self._boxes: list[NDArray[np.float32]] = []
        self._labels: list[NDArray[np.int64]] = []
        self._difficult: list[NDArray[np.bool_]] = []
        points: list[tuple[str, _Object]] = []
        folder = find_voc_root(root)
        for stem in _read_list(folder, split):
            annotation = folder / "Annotations" / f"{stem}.xml"
            objects = _read_objects(annotation, on_error)
            points += [(annotation.name, item) for item in objects if _is_point(item)]
            with reported(on_error):
                path, size = _find_image(folder, stem)
                self._add(path, size, annotation, [item for item in objects if not _is_point(item)], on_error)
        warn_left_out(
            f"{folder}: left out {len(points)} box(es) without width or height, in "
            f"{', '.join(name for name, _ in points[:5])}",
            [f"{folder / 'Annotations' / name}: box {item.corners} of {item.name}" for name, item in points],
            on_error,
        )

    def _add(
        self, path: Path, size: tuple[int, int], annotation: Path, objects: Sequence[_Object], on_error: OnError
    ) -> None:
        """Take in an image with those of its objects that are right."""
        rows: list[tuple[tuple[float, ...], int, bool]] = []
        for item in objects:
            with reported(on_error):
                rows.append((_to_unit(item, size, annotation), _label(item, self.classes, annotation), item.difficult))
        self.paths.append(path)
        self._boxes.append(np.array([corners for corners, _, _ in rows], dtype=np.float32).reshape(-1, 4))
        self._labels.append(np.array([label for _, label, _ in rows], dtype=np.int64))
        self._difficult.append(np.array([difficult for *_, difficult in rows], dtype=np.bool_))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        image, boxes, labels = self._decoded.get(self.paths[index]), self._boxes[index], self._labels[index]
        return detection_sample(index, image, boxes, labels, self._transform, self._difficult[index])


def voc_classes(root: Path, splits: Sequence[str], on_error: OnError = raise_error) -> tuple[str, ...]:
    """VOC's twenty classes if they cover what the splits show, else the names found there, sorted.

    Raises:
        DataError: if none of the lists is there; by ``on_error``, if an annotation is wrong or there is no object.
    """
    folder = find_voc_root(root)
    there = [split for split in splits if (folder / "ImageSets" / "Main" / f"{split}.txt").is_file()] or splits[:1]
    stems = {stem for split in there for stem in _read_list(folder, split)}
    found = {item.name for stem in stems for item in _read_objects(folder / "Annotations" / f"{stem}.xml", on_error)}
    if not found:
        on_error(DataError(f"no object in {folder / 'Annotations'} for {', '.join(there)}: name the --classes"))
    return VOC_CLASSES if found <= set(VOC_CLASSES) else tuple(sorted(found))


def _read_list(folder: Path, split: str) -> list[str]:
    path = folder / "ImageSets" / "Main" / f"{split}.txt"
    if not path.is_file():
        others = ", ".join(sorted(other.stem for other in path.parent.glob("*.txt"))) or "none"
        masks = (folder / "ImageSets" / "Segmentation" / f"{split}.txt").is_file()
        remedy = "it has masks: say --task fcn" if masks else "choose with --split-train and --split-val"
        raise DataError(f"missing {path} (lists that exist: {others}): {remedy}")
    stems = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not stems:
        raise DataError(f"{path} lists no image: add a name a line")
    return stems


def _read_objects(path: Path, on_error: OnError) -> list[_Object]:
    objects = []
    with reported(on_error):
        for element in _parse(path).iter("object"):
            with reported(on_error):
                objects.append(_object(element, path))
    return objects


def _parse(path: Path) -> ET.Element:
    try:
        return ET.parse(path).getroot()
    except FileNotFoundError as error:
        raise DataError(
            f"missing {path}: an image without objects has an annotation without <object>", "missing annotation"
        ) from error
    except ET.ParseError as error:
        raise DataError(f"{path} is not XML: {error}", "wrong annotation") from error


def _object(element: ET.Element, path: Path) -> _Object:
    name = (element.findtext("name") or "").strip()
    texts = [element.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
    try:
        x1, y1, x2, y2 = (finite(text or "nothing") for text in texts)
    except ValueError as error:
        raise DataError(
            f"{path}: object {name!r} needs numbers xmin, ymin, xmax, ymax in bndbox: {error}", "wrong annotation"
        ) from error
    return _Object(name, (x1, y1, x2, y2), difficult=(element.findtext("difficult") or "0").strip() == "1")


def _is_point(item: _Object) -> bool:
    """A click without a drag: nominally a pixel wide or high, but no object."""
    x1, y1, x2, y2 = item.corners
    return x1 == x2 or y1 == y2


def _find_image(folder: Path, stem: str) -> tuple[Path, tuple[int, int]]:
    """The image's file, and its width and height; those in annotations are not always true."""
    for suffix in _SUFFIXES:
        path = folder / "JPEGImages" / f"{stem}{suffix}"
        if path.is_file():
            try:
                with Image.open(path) as image:
                    width, height = image.size
            except (OSError, SyntaxError, ValueError) as error:
                raise DataError(f"broken image: {path}: {error}", "broken file") from error
            return path, (width, height)
    raise DataError(
        f"missing image: {folder / 'JPEGImages' / stem}.jpg: add it, or remove {stem} from the split", "missing file"
    )


def _to_unit(item: _Object, size: tuple[int, int], path: Path) -> tuple[float, float, float, float]:
    """Corners as parts of width and height, from pixels counted from 1 with xmax and ymax inside the box."""
    width, height = size
    x1, y1, x2, y2 = item.corners[0] - 1, item.corners[1] - 1, item.corners[2], item.corners[3]
    if x2 <= x1 + 1 or y2 <= y1 + 1:
        raise DataError(
            f"{path}: box {item.corners} of {item.name}: xmax must exceed xmin, and ymax ymin", "box without extent"
        )
    if min(x1, y1) < -_TOLERANCE or x2 > width + _TOLERANCE or y2 > height + _TOLERANCE:
        raise DataError(
            f"{path}: box {item.corners} of {item.name} leaves its image of {width}x{height} pixels",
            "box outside its image",
        )
    return max(x1, 0) / width, max(y1, 0) / height, min(x2, width) / width, min(y2, height) / height


def _label(item: _Object, classes: tuple[str, ...], path: Path) -> int:
    if item.name not in classes:
        raise DataError(
            f"{path}: class {item.name!r} is not one of {', '.join(classes)}: add it to --classes", "unknown label"
        )
    return classes.index(item.name)
