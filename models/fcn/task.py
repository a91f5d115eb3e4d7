"""Semantic segmentation as a task: which data, which network, which recipe."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from models.choices import check_choice
from models.data.images import DecodedImages
from models.data.mask_folders import MaskFolders, read_label_table
from models.data.pixels import IMAGENET
from models.data.segmentation_transforms import Augmentation, SegmentationTransform, normalise
from models.data.spec import parse_data_spec
from models.data.synthetic_segmentation import SYNTHETIC_CLASSES, SyntheticSegmentation
from models.data.voc_classes import VOC_CLASSES, VOID
from models.data.voc_segmentation import VOCSegmentation
from models.drawing import draw_masks
from models.errors import OnError, TaskError, raise_error
from models.fcn.loss import segmentation_loss
from models.fcn.metric import SegmentationMetric
from models.fcn.network import MIN_SIZE
from models.fcn.networks import AUXILIARY, NETWORKS
from models.fcn.palette import voc_palette
from models.options import Recipe, TaskOptions
from models.task import Batch, LossSum, Sample, Split

__all__ = ["FCNTask"]

_IMAGE_SIZE = (320, 480)
"""Crop of Dive into Deep Learning, section 14.9: fits into most of VOC's images."""


class FCNTask:
    """A fully convolutional network, from scratch, on synthetic shapes or on data in Pascal VOC's layout.

    Args:
        options: ``model`` is None or a key of ``NETWORKS``; ``data`` is ``synthetic`` or ``voc:PATH``.

    Raises:
        TaskError: if an option does not fit.
    """

    name = "fcn"

    def __init__(self, options: TaskOptions) -> None:
        name = options.model or "fcn_resnet18"
        check_choice("fcn has no model", name, NETWORKS)
        self._network = NETWORKS[name]
        self.recipes: Mapping[str, Recipe] = self._network.recipes
        check_choice(f"{name} has no recipe", options.recipe, self.recipes)
        check_choice("fcn has no --augment", options.augment or "none", get_args(Augmentation))
        self._options = options
        self._spec = parse_data_spec(options.data, ("synthetic", "voc", "masks"))
        self._decoded = DecodedImages(options.image_cache << 20)
        self._image_size = options.image_size or _IMAGE_SIZE
        if min(self._image_size) < MIN_SIZE:
            raise TaskError(
                "--image-size {} {} is too small: fcn needs {min} {min} or more".format(*self._image_size, min=MIN_SIZE)
            )
        self._table = read_label_table(self._spec.path) if self._spec.kind == "masks" else None
        own_classes = SYNTHETIC_CLASSES if self._spec.kind == "synthetic" else VOC_CLASSES
        self.class_names = self._table.names if self._table else ("background", *(options.classes or own_classes))
        """Names by label."""
        self.classes = self.class_names[1:] if self._has_background() else self.class_names
        if self._table and options.classes is not None:
            raise TaskError("--classes: masks:PATH has its classes in classes.csv")
        if self._spec.kind == "synthetic" and len(self.class_names) <= len(SYNTHETIC_CLASSES):
            raise TaskError(f"--classes: synthetic pictures need {len(SYNTHETIC_CLASSES)} classes or more")
        if len(self.class_names) > VOID:
            raise TaskError(
                f"--classes: {len(self.class_names) - 1} classes are too many: a mask has room for {VOID - 1}"
            )

    def build_model(self) -> nn.Module:
        """The network with random weights."""
        return self._network.build(len(self.class_names))

    def build_dataset(self, split: Split, on_error: OnError = raise_error) -> Dataset[Sample]:
        """Training crops or whole validation images; the target is ``mask``, (H, W) uint8.

        Raises:
            DataError: if a folder or list is missing; by ``on_error``, if an image or mask is.
        """
        options = self._options
        # d2l crops, but does not flip.
        preset: Any = options.augment or "crop"
        shown: Split = split if on_error is raise_error else "val"  # who looks for what is wrong sees all of it
        transform = SegmentationTransform(shown, self._image_size, flip=options.recipe != "d2l", augment=preset)
        if self._spec.kind == "synthetic":
            length = options.synthetic_train if split == "train" else options.synthetic_val
            return SyntheticSegmentation(split, length, self._image_size, options.seed, transform)
        if self._table is not None:
            return MaskFolders(self._spec.path, split, self._table, transform, self._decoded, on_error)
        list_name = options.split_train if split == "train" else options.split_val
        return VOCSegmentation(self._spec.path, list_name, len(self.class_names), transform, self._decoded, on_error)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Pad at the bottom and right to the largest height and width: images with zeros, masks with void."""
        height = max(MIN_SIZE, *(sample.image.shape[1] for sample in samples))
        width = max(MIN_SIZE, *(sample.image.shape[2] for sample in samples))
        images = torch.stack([_pad(sample.image, height, width, 0) for sample in samples])
        masks = torch.stack([_pad(sample.target["mask"], height, width, VOID) for sample in samples])
        return Batch(images, {"mask": masks}, torch.tensor([sample.id for sample in samples]))

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Cross-entropy summed over the labelled pixels, with that of an auxiliary head, and their number."""
        outputs = model(batch.images)
        logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
        total, weight = segmentation_loss(logits, batch.targets["mask"])
        for extra in auxiliary:
            total = total + AUXILIARY * segmentation_loss(extra, batch.targets["mask"]).total
        return LossSum(total, weight)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """The likeliest label of every pixel, (N, H, W) uint8."""
        logits_NKHW: Tensor = model(batch.images)
        return logits_NKHW.argmax(dim=1).to(torch.uint8)

    def build_metric(self) -> SegmentationMetric:
        """An empty confusion matrix."""
        return SegmentationMetric(self.class_names)

    def prepare(self, image: Tensor) -> Tensor:
        """Normalise a (3, H, W) uint8 image at its own size; below 32 pixels it is padded at the bottom and right."""
        height, width = (max(MIN_SIZE, length) for length in image.shape[1:])
        return _pad(normalise(image), height, width, 0)

    def draw(self, image: Tensor, outputs: Tensor, index: int) -> Tensor:
        """A copy of the (3, H, W) uint8 ``image``, tinted in VOC's colours where label map ``index`` sees an object."""
        # What collate or prepare padded lies at the bottom and right.
        labels_HW = outputs[index, : image.shape[1], : image.shape[2]].to(image.device)
        return draw_masks(image, self._shift(labels_HW), self._palette())

    def _shift(self, labels_HW: Tensor) -> Tensor:
        """Labels in which 0 is what is not tinted."""
        return labels_HW if self._has_background() else labels_HW.long() + 1

    def _palette(self) -> list[tuple[int, int, int]]:
        palette = voc_palette(VOID + 1)
        return palette if self._has_background() else [*palette, palette[VOID]]

    def _has_background(self) -> bool:
        return self.class_names[0].strip("_ ").lower() in ("background", "bg")

    def restore(self, image: Tensor) -> Tensor:
        """The (3, h, w) uint8 picture of what the model gets."""
        return IMAGENET.restore(image)

    def show(self, sample: Sample) -> Tensor:
        """Its mask in VOC's colours; what nobody labelled is pale."""
        return draw_masks(self.restore(sample.image), self._shift(sample.target["mask"]), self._palette())

    def count(self, sample: Sample) -> Mapping[str, int]:
        """Pixels of each class."""
        counts = torch.bincount(sample.target["mask"].flatten(), minlength=VOID + 1).tolist()
        names = dict(enumerate(self.class_names)) | {VOID: "void"}
        return {name: counts[label] for label, name in names.items() if counts[label]}


def _pad(pixels: Tensor, height: int, width: int, value: int) -> Tensor:
    """(..., H, W) padded at the bottom and right."""
    return F.pad(pixels, (0, width - pixels.shape[-1], 0, height - pixels.shape[-2]), value=value)
