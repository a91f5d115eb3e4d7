"""The seam between what is learned and how it is trained: a user's own task implements ``Task``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from models.errors import OnError, raise_error
from models.options import Recipe

__all__ = ["Batch", "Drawable", "LossSum", "Metric", "Outputs", "Sample", "Showable", "Split", "Task", "recipe_of"]

Split = Literal["train", "val"]
Outputs = Any
"""Whatever ``predict`` returns; only the task's own metric and drawing look inside."""


class Sample(NamedTuple):
    """One image and what is known of it."""

    image: Tensor
    """(C, H, W) float32."""
    target: Mapping[str, Tensor]
    """Named tensors, e.g. boxes and labels, or a mask."""
    id: int
    """Index of the sample in its split."""


@dataclass(frozen=True)
class Batch:
    """Samples put together by ``Task.collate``: one microbatch, or one batch of an evaluation."""

    images: Tensor
    """(N, C, H, W) float32."""
    targets: Mapping[str, Tensor]
    """Named tensors with N as first dimension."""
    ids: Tensor
    """(N,) int64, indices of the samples in their split."""

    def __len__(self) -> int:
        return self.images.shape[0]

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, which a GPU reads without waiting; a ``DataLoader`` calls it."""
        targets = {name: value.pin_memory() for name, value in self.targets.items()}
        return replace(self, images=self.images.pin_memory(), targets=targets)

    def to(self, device: torch.device, *, channels_last: bool = False) -> "Batch":
        """The batch on ``device``; images in channels-last order if asked for."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return replace(
            self,
            images=self.images.to(device, non_blocking=True).contiguous(memory_format=layout),
            targets={name: value.to(device, non_blocking=True) for name, value in self.targets.items()},
        )


class LossSum(NamedTuple):
    """A loss as numerator and denominator, so that any split of a minibatch gives the same mean (E1)."""

    total: Tensor
    """Scalar, a sum, attached to the graph also when the microbatch scores nothing."""
    weight: Tensor
    """Scalar float64 count: what the sum is divided by, over the whole minibatch."""


class Metric(Protocol):
    """A validation metric that can be computed in parts; a state of it must survive pickling."""

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Take in the predictions for one batch."""

    def merge(self, other: Self) -> None:
        """Take in what another worker counted; any order of merges gives the same value."""

    def compute(self) -> dict[str, float]:
        """The values by name; NaN where nothing was counted."""


class Task(Protocol):
    """One thing to learn. Built once in every process from the same options.

    ``build_model`` is called under a seeded generator. A data set is indexed by ``0..len-1``; random transforms in it
    draw from torch's global generator, which the caller seeds from ``(seed, epoch, sample)`` around each sample (E3),
    so they need no generator of their own. The same holds for dropout and ``(seed, step, microbatch)``.
    A task may have an attribute ``recipes`` (a mapping from name to ``Recipe``); without it ``Recipe()`` holds.
    """

    name: str

    def build_model(self) -> nn.Module:
        """A fresh network on the CPU with its initial weights."""

    def build_dataset(self, split: Split) -> Dataset[Sample]:
        """The samples of one split; random augmentation belongs to ``train`` alone."""

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Put at least one sample together."""

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Forward pass and *summed* loss of one microbatch."""

    def predict(self, model: nn.Module, batch: Batch) -> Outputs:
        """Predictions of a model in evaluation mode; the caller switches gradients off."""

    def build_metric(self) -> Metric:
        """A metric that has seen nothing."""


@runtime_checkable
class Drawable(Protocol):
    """What a task adds so that ``pushpull predict`` can show its predictions."""

    def prepare(self, image: Tensor) -> Tensor:
        """From a decoded (3, H, W) uint8 image to the (3, h, w) float32 that the model takes."""

    def draw(self, image: Tensor, outputs: Outputs, index: int) -> Tensor:
        """A copy of the (3, H, W) uint8 ``image``, perhaps enlarged, with prediction ``index`` drawn in."""


@runtime_checkable
class Showable(Protocol):
    """What a task adds so that ``pushpull data`` can check its samples, and predictions are shown beside them."""

    def build_dataset(self, split: Split, on_error: OnError = raise_error) -> Dataset[Sample]:
        """As ``Task.build_dataset``, but for entries that ``on_error`` takes: they are left out."""

    def restore(self, image: Tensor) -> Tensor:
        """The (3, h, w) uint8 picture of what the model gets of an image."""

    def show(self, sample: Sample) -> Tensor:
        """The same of a sample, with what is known of it drawn in."""

    def count(self, sample: Sample) -> Mapping[str, int]:
        """How many objects, or pixels, of each class a sample has; of a whole image 1."""


def recipe_of(task: Task, name: str) -> Recipe:
    """The recipe ``name`` of ``task``.

    Raises:
        KeyError: if the task has no recipe of that name.
    """
    recipes: Mapping[str, Recipe] = getattr(task, "recipes", {})
    return recipes[name] if recipes or name != "default" else Recipe()
