"""Pascal VOC's segmentation layout: JPEGImages, SegmentationClass and ImageSets/Segmentation."""

from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from models.data.images import DecodedImages, read_mask
from models.data.segmentation_transforms import SegmentationTransform
from models.data.voc_classes import VOID, find_voc_root
from models.errors import DataError, OnError, Trouble, raise_error, reported
from models.task import Sample

__all__ = ["VOCSegmentation"]

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


class VOCSegmentation(Dataset[Sample]):
    """The images of one list file with their masks of class indices.

    Args:
        path: a VOCdevkit, a VOC20xx in it, or any folder that holds ``JPEGImages``.
        split: name of the list in ``ImageSets/Segmentation``, without ``.txt``.
        num_classes: K, background included; masks hold ``0..K-1`` and 255 for void.
        transform: applied to every image and its mask.
        images: keeps what was decoded; None: nothing is kept.
        on_error: is told which image or mask is missing.

    Raises:
        DataError: if a folder or the list is missing; by ``on_error``, if an image or mask named in it is.
    """

    def __init__(
        self,
        path: Path,
        split: str,
        num_classes: int,
        transform: SegmentationTransform,
        images: DecodedImages | None = None,
        on_error: OnError = raise_error,
    ) -> None:
        root = find_voc_root(path)
        self.paths: list[Path] = []
        self._masks: list[Path] = []
        for name in _read_list(root, split):
            with reported(on_error):
                image = _existing(root / "JPEGImages", name, _IMAGE_SUFFIXES, split, "missing file")
                mask = _existing(root / "SegmentationClass", name, (".png",), split, "missing annotation")
                self.paths.append(image)
                self._masks.append(mask)
        self._num_classes = num_classes
        self._transform = transform
        self._decoded = images or DecodedImages()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``; its target ``mask`` is (H, W) uint8.

        Raises:
            DataError: if a file is broken, the mask's size is not the image's, or a label is out of range.
        """
        image = self._decoded.get(self.paths[index])
        mask = self._decoded.get(self._masks[index], read_mask)
        self._check(image, mask, index)
        return Sample(*self._transform(image, mask), index)

    def _check(self, image: Tensor, mask: Tensor, index: int) -> None:
        path = self._masks[index]
        if mask.shape != image.shape[1:]:
            raise DataError(
                f"{path} has {_size(mask)} pixels, but {self.paths[index].name} has {_size(image)}: "
                "a mask needs its image's height and width",
                "mask of another size",
            )
        foreign = mask[(mask >= self._num_classes) & (mask != VOID)]
        if foreign.numel():
            raise DataError(
                f"{path} has label {int(foreign[0])}, but the labels of {self._num_classes} classes are "
                f"0 (background) to {self._num_classes - 1}, and 255 for void: name every class with --classes",
                "unknown label",
            )


def _read_list(root: Path, split: str) -> list[str]:
    """The names in ``ImageSets/Segmentation/<split>.txt``."""
    folder = root / "ImageSets" / "Segmentation"
    path = folder / f"{split}.txt"
    if not path.is_file():
        found = ", ".join(sorted(file.stem for file in folder.glob("*.txt"))) or "none"
        raise DataError(f"no such list: {path} (lists that exist: {found}): choose with --split-train and --split-val")
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names:
        raise DataError(f"{path} lists no image")
    return names


def _existing(folder: Path, name: str, suffixes: tuple[str, ...], split: str, kind: Trouble) -> Path:
    """The file of that name in ``folder``."""
    for suffix in suffixes:
        if (path := folder / f"{name}{suffix}").is_file():
            return path
    raise DataError(f"missing {folder / name}{suffixes[0]}, which ImageSets/Segmentation/{split}.txt lists", kind)


def _size(pixels: Tensor) -> str:
    return "x".join(str(length) for length in pixels.shape[-2:])
