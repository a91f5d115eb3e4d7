"""A task of your own, in one file: ``pushpull train examples/count_task.py:CountTask --workers 2``."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from models.options import Recipe
from models.task import Batch, LossSum, Sample, Split


class Squares(Dataset[Sample]):
    """Noise with none to three bright squares; image ``index`` of a split is always the same."""

    def __init__(self, split: Split) -> None:
        self.first, self.length = (0, 512) if split == "train" else (10_000, 128)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        rng = torch.Generator().manual_seed(self.first + index)
        image, count = torch.rand(1, 32, 32, generator=rng), int(torch.randint(4, (), generator=rng))
        for cell in torch.randperm(16, generator=rng)[:count].tolist():
            row, column = 8 * (cell // 4), 8 * (cell % 4)
            image[:, row + 1 : row + 7, column + 1 : column + 7] += 2
        return Sample(image, {"count": torch.tensor(count)}, index)


class Accuracy:
    """Part of the images whose squares were counted right; each worker counts its own, then they are merged."""

    right = seen = 0

    def update(self, outputs: Tensor, batch: Batch) -> None:
        """Take in a batch."""
        self.right += int((outputs.cpu() == batch.targets["count"]).sum())
        self.seen += len(batch)

    def merge(self, other: "Accuracy") -> None:
        """Take in what another worker counted."""
        self.right, self.seen = self.right + other.right, self.seen + other.seen

    def compute(self) -> dict[str, float]:
        """The values that the run prints and writes down."""
        return {"accuracy": self.right / max(1, self.seen)}


class CountTask:
    """How many bright squares are there? See models/task.py for what each method is asked."""

    name = "count"
    recipes: Mapping[str, Recipe] = {
        "default": Recipe(batch_size=16, epochs=8, optimizer="adam", lr=0.01, schedule="cosine")
    }

    def build_model(self) -> nn.Module:
        """A small convolutional network with batch norm."""
        layers = [nn.Conv2d(1, 16, 5, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 5, stride=2)]
        return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))

    def build_dataset(self, split: Split) -> Dataset[Sample]:
        """What is learned from."""
        return Squares(split)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Stack images and counts."""
        images = torch.stack([sample.image for sample in samples])
        counts = torch.stack([sample.target["count"] for sample in samples])
        return Batch(images, {"count": counts}, torch.tensor([sample.id for sample in samples]))

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """A sum, and what to divide it by: so the workers' losses add up to that of the whole minibatch."""
        total = F.cross_entropy(model(batch.images), batch.targets["count"], reduction="sum")
        return LossSum(total, torch.tensor(len(batch), dtype=torch.float64))

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """The likeliest count of each image."""
        scores_NK: Tensor = model(batch.images)
        return scores_NK.argmax(dim=1)

    def build_metric(self) -> Accuracy:
        """An empty metric."""
        return Accuracy()
