"""Detection data in Pascal VOC's layout."""

import warnings
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
from models.data.images import DecodedImages
from models.data.voc_classes import VOC_CLASSES, find_voc_root
from models.errors import DataError
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

    Raises:
        DataError: if a folder, list, annotation or image is missing or wrong; it names the file.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        transform: DetectionTransform,
        classes: tuple[str, ...],
        images: DecodedImages | None = None,
    ) -> None:
        self.classes = classes
        self._transform = transform
        self._decoded = images or DecodedImages()
        self._paths: list[Path] = []
        # Arrays: a loader process would get each tensor as a shared file of its own.
        self._boxes: list[NDArray[np.float32]] = []
        self._labels: list[NDArray[np.int64]] = []
        self._difficult: list[NDArray[np.bool_]] = []
        points: list[str] = []
        folder = find_voc_root(root)
        for stem in _read_list(folder, split):
            annotation = folder / "Annotations" / f"{stem}.xml"
            objects = _read_objects(annotation)
            kept = [item for item in objects if not _is_point(item)]
            points += [annotation.name] * (len(objects) - len(kept))
            path, size = _find_image(folder, stem)
            corners = [_to_unit(item, size, annotation) for item in kept]
            self._paths.append(path)
            self._boxes.append(np.array(corners, dtype=np.float32).reshape(-1, 4))
            self._labels.append(np.array([_label(item, classes, annotation) for item in kept], dtype=np.int64))
            self._difficult.append(np.array([item.difficult for item in kept], dtype=np.bool_))
        if points:
            warnings.warn(
                f"{folder}: left out {len(points)} box(es) without width or height, in {', '.join(points[:5])}",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Sample:
        image, boxes, labels = self._decoded.get(self._paths[index]), self._boxes[index], self._labels[index]
        return detection_sample(index, image, boxes, labels, self._transform, self._difficult[index])


def voc_classes(root: Path, splits: Sequence[str]) -> tuple[str, ...]:
    """VOC's twenty classes if they cover what the splits show, else the names found there, sorted.

    Raises:
        DataError: if none of the lists is there, an annotation is wrong, or there is no object at all.
    """
    folder = find_voc_root(root)
    there = [split for split in splits if (folder / "ImageSets" / "Main" / f"{split}.txt").is_file()] or splits[:1]
    stems = {stem for split in there for stem in _read_list(folder, split)}
    found = {item.name for stem in stems for item in _read_objects(folder / "Annotations" / f"{stem}.xml")}
    if not found:
        raise DataError(f"no object in {folder / 'Annotations'} for {', '.join(there)}: name the --classes")
    return VOC_CLASSES if found <= set(VOC_CLASSES) else tuple(sorted(found))


def _read_list(folder: Path, split: str) -> list[str]:
    path = folder / "ImageSets" / "Main" / f"{split}.txt"
    if not path.is_file():
        others = ", ".join(sorted(other.stem for other in path.parent.glob("*.txt"))) or "none"
        raise DataError(f"missing {path}: splits there: {others}")
    stems = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not stems:
        raise DataError(f"{path} lists no image: add a name a line")
    return stems


def _read_objects(path: Path) -> list[_Object]:
    try:
        tree = ET.parse(path)
    except FileNotFoundError as error:
        raise DataError(f"missing {path}: an image without objects has an annotation without <object>") from error
    except ET.ParseError as error:
        raise DataError(f"{path} is not XML: {error}") from error
    objects = []
    for element in tree.getroot().iter("object"):
        name = (element.findtext("name") or "").strip()
        texts = [element.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
        try:
            x1, y1, x2, y2 = (float(text or "nothing") for text in texts)
        except ValueError as error:
            raise DataError(
                f"{path}: object {name!r} needs numbers xmin, ymin, xmax, ymax in bndbox: {error}"
            ) from error
        difficult = (element.findtext("difficult") or "0").strip() == "1"
        objects.append(_Object(name, (x1, y1, x2, y2), difficult))
    return objects


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
                raise DataError(f"broken image: {path}: {error}") from error
            return path, (width, height)
    raise DataError(f"missing image: {folder / 'JPEGImages' / stem}.jpg: add it, or remove {stem} from the split")


def _to_unit(item: _Object, size: tuple[int, int], path: Path) -> tuple[float, float, float, float]:
    """Corners as parts of width and height, from pixels counted from 1 with xmax and ymax inside the box."""
    width, height = size
    x1, y1, x2, y2 = item.corners[0] - 1, item.corners[1] - 1, item.corners[2], item.corners[3]
    if x2 <= x1 + 1 or y2 <= y1 + 1:
        raise DataError(f"{path}: box {item.corners} of {item.name}: xmax must exceed xmin, and ymax ymin")
    if min(x1, y1) < -_TOLERANCE or x2 > width + _TOLERANCE or y2 > height + _TOLERANCE:
        raise DataError(f"{path}: box {item.corners} of {item.name} leaves its image of {width}x{height} pixels")
    return max(x1, 0) / width, max(y1, 0) / height, min(x2, width) / width, min(y2, height) / height


def _label(item: _Object, classes: tuple[str, ...], path: Path) -> int:
    if item.name not in classes:
        raise DataError(f"{path}: class {item.name!r} is not one of {', '.join(classes)}: add it to --classes")
    return classes.index(item.name)
