"""How many images were given their class."""

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from models.task import Batch

__all__ = ["ClassificationMetric", "Scores"]

_TOP = 5


class Scores(NamedTuple):
    """What ``predict`` gives for a batch."""

    probabilities_NK: Tensor
    """(N, K) float32."""


class ClassificationMetric:
    """Implements ``models.task.Metric`` by counts, so that merging is exact in any order.

    Args:
        classes: names of the classes, in the order of their labels.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self._classes = tuple(classes)
        self.right_K = torch.zeros(len(self._classes), dtype=torch.int64)
        """Images of each class whose likeliest class it is."""
        self.near = 0
        """Images whose class is among the likeliest five."""
        self.seen_K = torch.zeros(len(self._classes), dtype=torch.int64)
        """Images of each class."""

    def update(self, outputs: Scores, batch: Batch) -> None:
        """Count a batch."""
        labels_N = batch.targets["label"].to(outputs.probabilities_NK.device)
        top_NT = outputs.probabilities_NK.topk(min(_TOP, len(self._classes)), dim=1).indices
        hit_NT = top_NT == labels_N[:, None]
        self.near += int(hit_NT.any(dim=1).sum())
        self.right_K += torch.bincount(labels_N[hit_NT[:, 0]], minlength=len(self._classes)).cpu()
        self.seen_K += torch.bincount(labels_N, minlength=len(self._classes)).cpu()

    def merge(self, other: Self) -> None:
        """Add what ``other`` counted."""
        self.right_K += other.right_K
        self.near += other.near
        self.seen_K += other.seen_K

    def compute(self) -> dict[str, float]:
        """``accuracy``, ``top5_accuracy``, ``mean_accuracy`` over the classes seen, and ``accuracy/<class>`` of each.

        NaN if nothing was counted.
        """
        total = int(self.seen_K.sum())
        seen_K = self.seen_K > 0
        by_class_K = self.right_K.double() / self.seen_K
        return {
            "accuracy": int(self.right_K.sum()) / total if total else float("nan"),
            "top5_accuracy": self.near / total if total else float("nan"),
            "mean_accuracy": float(by_class_K[seen_K].mean()),
            **{f"accuracy/{self._classes[k]}": float(by_class_K[k]) for k in seen_K.nonzero().flatten().tolist()},
        }
