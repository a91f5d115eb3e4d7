"""Image classification as a task."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from models.choices import check_choice
from models.classify.metric import ClassificationMetric, Scores
from models.classify.networks import build_network, default_size, list_networks
from models.data.classification import (
    CIFAR_CLASSES,
    SYNTHETIC_LABELS,
    Cifar10,
    ClassFolders,
    SyntheticClassification,
    folder_classes,
)
from models.data.classification_transforms import ClassificationTransform
from models.data.images import DecodedImages
from models.data.pixels import IMAGENET
from models.data.spec import parse_data_spec
from models.drawing import class_colour, draw_text
from models.errors import OnError, TaskError, raise_error
from models.options import Recipe, TaskOptions
from models.task import Batch, LossSum, Sample, Split

__all__ = ["ClassifyTask"]

_AUXILIARY = 0.3
"""Weight of the loss of an auxiliary head: Szegedy et al., CVPR 2015, section 5."""


class ClassifyTask:
    """Implements ``models.task.Task``, ``Drawable`` and ``Showable``.

    Args:
        options: ``model`` is ``lenet`` (the default) or a network of torchvision's; ``data`` is ``synthetic``,
            ``folder:PATH`` or ``cifar10:PATH``.

    Raises:
        TaskError: if the model or the recipe does not exist.
        DataError: if ``--data`` is not understood or its folder is missing.
    """

    name = "classify"
    recipes: Mapping[str, Recipe] = {
        "default": Recipe(
            batch_size=64, epochs=30, lr=0.02, momentum=0.9, weight_decay=5e-4, schedule="cosine", warmup_steps=50
        ),
        # For --weights: small steps, and ten times as large ones for what is new.
        "finetune": Recipe(
            batch_size=64,
            epochs=10,
            lr=0.002,
            momentum=0.9,
            weight_decay=1e-4,
            schedule="cosine",
            lr_factors=(("fc.*", 10.0), ("classifier.*", 10.0), ("heads.*", 10.0)),
        ),
    }

    def __init__(self, options: TaskOptions) -> None:
        self._model = options.model or "lenet"
        if self._model not in list_networks():
            raise TaskError(
                f"classify has no model {self._model!r}: use lenet, or one of torchvision such as resnet18, vgg16, "
                "mobilenet_v3_small, efficientnet_b0, vit_b_16"
            )
        check_choice("classify has no recipe", options.recipe, self.recipes)
        check_choice("classify has no --augment", options.augment or "none", ("none", "crop"))
        side = default_size(self._model)
        self._size = options.image_size or (side, side)
        if self._model == "lenet" and self._size != (side, side):
            raise TaskError(f"--image-size {self._size[0]}x{self._size[1]}: lenet takes images of {side}x{side} alone")
        self._options = options
        self._spec = parse_data_spec(options.data, ("synthetic", "folder", "cifar10"))
        own = {"synthetic": SYNTHETIC_LABELS, "cifar10": CIFAR_CLASSES}.get(self._spec.kind, ())
        if options.classes is not None and len(options.classes) < len(own):
            raise TaskError(f"--classes: {self._spec.kind} has {len(own)} classes, and each needs a name")
        self._decoded = DecodedImages(options.image_cache << 20)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of their labels; may read the data."""
        if self._options.classes is not None:
            return self._options.classes
        if self._spec.kind == "synthetic":
            return SYNTHETIC_LABELS
        return CIFAR_CLASSES if self._spec.kind == "cifar10" else folder_classes(self._spec.path)

    def build_model(self) -> nn.Module:
        """The network with random weights."""
        return build_network(self._model, len(self.classes), self._size)

    def build_dataset(self, split: Split, on_error: OnError = raise_error) -> Dataset[Sample]:
        """Samples with ``label``, an int64 scalar."""
        options, path = self._options, self._spec.path
        transform = self._transform(augment=split == "train" and options.augment != "none")
        if self._spec.kind == "synthetic":
            length = options.synthetic_train if split == "train" else options.synthetic_val
            return SyntheticClassification(split, length, options.seed, self._size, transform)
        if self._spec.kind == "cifar10":
            return Cifar10(path, split, transform)
        return ClassFolders(path, split, transform, self.classes, self._decoded, on_error)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Stack images and labels."""
        return Batch(
            images=torch.stack([sample.image for sample in samples]),
            targets={"label": torch.stack([sample.target["label"] for sample in samples])},
            ids=torch.tensor([sample.id for sample in samples], dtype=torch.int64),
        )

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Cross-entropy summed over the images, with that of auxiliary heads; the weight is their number."""
        outputs = model(batch.images)
        logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
        labels_N = batch.targets["label"]
        total = F.cross_entropy(logits.float(), labels_N, reduction="sum")
        for extra in auxiliary:
            if extra is not None:
                total = total + _AUXILIARY * F.cross_entropy(extra.float(), labels_N, reduction="sum")
        return LossSum(total, total.new_full((), len(batch), dtype=torch.float64))

    def predict(self, model: nn.Module, batch: Batch) -> Scores:
        """Probabilities of the classes."""
        return Scores(model(batch.images).float().softmax(dim=1))

    def build_metric(self) -> ClassificationMetric:
        """Nothing counted yet."""
        return ClassificationMetric(self.classes)

    def prepare(self, image: Tensor) -> Tensor:
        """From a decoded (3, H, W) uint8 image to the (3, h, w) float32 that the model takes."""
        return self._transform(augment=False)(image)

    def draw(self, image: Tensor, outputs: Scores, index: int) -> Tensor:
        """As ``draw_text`` does: the likeliest class and its probability."""
        probability, label = outputs.probabilities_NK[index].max(dim=0)
        return draw_text(image, f"{self.classes[int(label)]} {float(probability):.2f}", class_colour(int(label)))

    def restore(self, image: Tensor) -> Tensor:
        """The (3, h, w) uint8 picture of what the model gets."""
        return IMAGENET.restore(image)

    def show(self, sample: Sample) -> Tensor:
        """With its class."""
        label = int(sample.target["label"])
        return draw_text(self.restore(sample.image), self.classes[label], class_colour(label))

    def count(self, sample: Sample) -> Mapping[str, int]:
        """One of its class."""
        return {self.classes[int(sample.target["label"])]: 1}

    def _transform(self, *, augment: bool) -> ClassificationTransform:
        return ClassificationTransform(self._size, augment=augment)
