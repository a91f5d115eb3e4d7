"""Images with one class each: a folder of class folders, CIFAR-10's files, or shapes made on the fly."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import IMG_EXTENSIONS

from models.data.classification_transforms import ClassificationTransform
from models.data.images import DecodedImages
from models.data.synthetic import Synthetic
from models.data.synthetic_detection import SHAPES, draw_shapes
from models.errors import DataError, OnError, raise_error
from models.task import Sample, Split

__all__ = ["CIFAR_CLASSES", "SYNTHETIC_LABELS", "Cifar10", "ClassFolders", "SyntheticClassification", "folder_classes"]

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SYNTHETIC_LABELS = ("nothing", *SHAPES)
"""What is largest in a synthetic image."""


def folder_classes(root: Path) -> tuple[str, ...]:
    """Names of the folders in ``root/train``, sorted.

    Raises:
        DataError: if there are none.
    """
    folder = root / "train"
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
    if not names:
        raise DataError(f"{root} is not a folder of class folders: it holds no train/CLASS/IMAGE")
    return tuple(names)


class ClassFolders(Dataset[Sample]):
    """``ROOT/train/CLASS/*.jpg`` and ``ROOT/val/CLASS/*.jpg``, as torchvision's ``ImageFolder`` reads them.

    Args:
        root: the folder that holds ``train`` and ``val``.
        split: train or val.
        transform: applied to every image.
        classes: names of the labels 0, 1, …: folders.
        images: keeps what was decoded; None: nothing is kept.
        on_error: is told which folder is of no class.

    Raises:
        DataError: if a folder is missing or empty; by ``on_error``, if one is of no class.
    """

    def __init__(
        self,
        root: Path,
        split: Split,
        transform: ClassificationTransform,
        classes: tuple[str, ...],
        images: DecodedImages | None = None,
        on_error: OnError = raise_error,
    ) -> None:
        self._transform = transform
        self._decoded = images or DecodedImages()
        folder = root / split
        if not folder.is_dir():
            raise DataError(f"missing {folder}: a folder of class folders holds train and val")
        for name in sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name not in classes):
            on_error(DataError(f"{folder / name} is none of the classes {', '.join(classes)}", "unknown label"))
        found = [(path, label) for label, name in enumerate(classes) for path in _images(folder / name)]
        if not found:
            raise DataError(f"{folder} holds no image ({', '.join(IMG_EXTENSIONS)})")
        self.paths = [path for path, _ in found]
        self._labels: NDArray[np.int64] = np.array([label for _, label in found], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        return _sample(self._transform(self._decoded.get(self.paths[index])), int(self._labels[index]), index)


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)


class Cifar10(Dataset[Sample]):
    """CIFAR-10's python files, ``ROOT/cifar-10-batches-py``; their checksums are compared before they are unpickled.

    Args:
        root: the folder that holds ``cifar-10-batches-py``.
        split: train (50,000 images) or val (10,000, its test set).
        transform: applied to every image.

    Raises:
        DataError: if a file is missing or is not the original.
    """

    def __init__(self, root: Path, split: Split, transform: ClassificationTransform) -> None:
        self._transform = transform
        try:
            self._data = CIFAR10(str(root), train=split == "train", download=False)
        except RuntimeError as error:
            raise DataError(f"{root} does not hold the files of cifar-10-batches-py: {error}") from error

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Sample:
        pixels = torch.from_numpy(self._data.data[index]).permute(2, 0, 1).contiguous()
        return _sample(self._transform(pixels), int(self._data.targets[index]), index)


class SyntheticClassification(Synthetic):
    """The images of ``SyntheticDetection`` with all three shapes; the class is that of the largest one, or nothing.

    Args:
        split: train or val; their images differ.
        length: number of images.
        seed: of the whole data set.
        size: height and width in pixels.
        transform: applied to every image.
    """

    def __init__(
        self, split: Split, length: int, seed: int, size: tuple[int, int], transform: ClassificationTransform
    ) -> None:
        super().__init__(split, length, seed)
        self._size = size
        self._transform = transform

    def __getitem__(self, index: int) -> Sample:
        rng = self._generator(index)
        pixels, boxes, labels = draw_shapes(rng, *self._size, len(SHAPES))
        sides = [x2 - x1 for x1, _, x2, _ in boxes]
        label = 1 + labels[sides.index(max(sides))] if sides else 0
        return _sample(self._transform(torch.from_numpy(pixels)), label, index)


def _sample(image: Tensor, label: int, index: int) -> Sample:
    return Sample(image, {"label": torch.tensor(label, dtype=torch.int64)}, index)
