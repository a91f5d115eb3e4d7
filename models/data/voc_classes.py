"""Pascal VOC's class names and void label, and the folder of a data set in its layout."""

import re
from pathlib import Path

from models.errors import DataError

__all__ = ["VOC_CLASSES", "VOID", "find_voc_root"]

VOID = 255
"""Label of a pixel that nobody labelled: it counts neither in a loss nor in a metric."""

VOC_CLASSES: tuple[str, ...] = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
"""The 20 classes without background, in the order of their labels (a mask's label 1 is ``aeroplane``)."""


def find_voc_root(path: Path) -> Path:
    """The folder that holds ``JPEGImages``: ``path`` itself, or a ``VOC20xx`` in it or in a ``VOCdevkit`` in it.

    Of several years VOC2012 is taken, else the newest.

    Raises:
        DataError: if there is no such folder.
    """
    for folder in (path, path / "VOCdevkit"):
        if (folder / "JPEGImages").is_dir():
            return folder
        years = sorted(
            root.parent for root in folder.glob("VOC*/JPEGImages") if re.fullmatch(r"VOC\d{4}", root.parts[-2])
        )
        if years:
            return next((root for root in years if root.name == "VOC2012"), years[-1])
    raise DataError(f"{path} is not a VOC data set: it holds neither JPEGImages nor VOC20xx/JPEGImages")
