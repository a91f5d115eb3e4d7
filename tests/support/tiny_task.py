"""A task that trains in milliseconds and has everything that breaks equality where it is handled wrongly.

Batch norm (buffers, one of them an integer), dropout, random augmentation from three generators, samples without a
label (so that a microbatch may score nothing), a weight that is not the number of samples.
"""

import random
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from models.options import Recipe
from models.task import Batch, LossSum, Sample, Split

UNLABELLED = -1
CLASSES = 3


class TinyNet(nn.Module):
    """(N, 3, 8, 8) images to (N, 3) scores."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.25)
        self.body = nn.Conv2d(8, 6, 3, stride=2, bias=False)
        self.head = nn.Linear(6, CLASSES)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, images_N3HW: Tensor) -> Tensor:
        """Scores of the classes."""
        x = self.drop(F.relu(self.norm(self.stem(images_N3HW))))
        x = F.relu(self.body(x)).mean(dim=(2, 3))
        scores: Tensor = self.head(x) * self.scale
        return scores


class RandomImages(Dataset[Sample]):
    """Noise whose mean tells the class; two of three samples have no label."""

    def __init__(self, split: Split, size: int) -> None:
        self._augment = split == "train"
        generator = torch.Generator().manual_seed(size)
        self._images_N3HW = torch.randn(size, 3, 8, 8, generator=generator)
        self._labels = torch.randint(0, CLASSES, (size,), generator=generator)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Sample:
        image, label = self._images_N3HW[index], int(self._labels[index])
        if self._augment:
            image = image + 0.1 * torch.randn(3, 8, 8) + random.random() + float(np.random.rand())
            label = UNLABELLED if index % 3 else label
        return Sample(image + label, {"label": torch.tensor(label)}, index)


class Hits:
    """Right predictions among all."""

    def __init__(self) -> None:
        self.right = self.seen = 0

    def update(self, outputs: Tensor, batch: Batch) -> None:
        """Count one batch."""
        self.right += int((outputs.argmax(1).cpu() == batch.targets["label"]).sum())
        self.seen += len(batch)

    def merge(self, other: "Hits") -> None:
        """Add another worker's counts."""
        self.right += other.right
        self.seen += other.seen

    def compute(self) -> dict[str, float]:
        """The share of hits."""
        return {"accuracy": self.right / self.seen, "seen": float(self.seen)}


class TinyTask:
    """Classifies noise."""

    name = "tiny"
    recipes: Mapping[str, Recipe] = {"default": Recipe()}

    def __init__(self, num_samples: int = 31) -> None:
        self._num_samples = num_samples

    def build_model(self) -> nn.Module:
        """See ``Task.build_model``."""
        return TinyNet()

    def build_dataset(self, split: Split) -> Dataset[Sample]:
        """See ``Task.build_dataset``."""
        return RandomImages(split, self._num_samples if split == "train" else 13)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """See ``Task.collate``."""
        return Batch(
            images=torch.stack([sample.image for sample in samples]),
            targets={"label": torch.stack([sample.target["label"] for sample in samples])},
            ids=torch.tensor([sample.id for sample in samples]),
        )

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Summed cross-entropy over the labelled samples, and their number."""
        label = batch.targets["label"]
        total = F.cross_entropy(model(batch.images), label, ignore_index=UNLABELLED, reduction="sum")
        return LossSum(total, (label != UNLABELLED).sum().double())

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """See ``Task.predict``."""
        scores: Tensor = model(batch.images)
        return scores

    def build_metric(self) -> Hits:
        """See ``Task.build_metric``."""
        return Hits()
