"""Classification networks by name: LeNet, and whatever torchvision has."""

from typing import Any

import torch
import torchvision.models
from torch import Tensor, nn

from models.errors import TaskError

__all__ = ["LeNet", "build_network", "default_size", "list_networks"]

_AUXILIARY = ("googlenet", "inception_v3")
_SIZES = {"lenet": 32, "inception_v3": 299}
_SIZE = 224


class LeNet(nn.Module):
    """LeNet-5 for colour images of 32 x 32 pixels, with ReLU and max pooling.

    Source: LeCun et al., "Gradient-Based Learning Applied to Document Recognition", 1998; widths as in the usual
    PyTorch tutorials on CIFAR-10 (16 and 32 channels).

    Args:
        num_classes: how many there are.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.classifier = nn.Sequential(
            nn.Linear(32 * 5 * 5, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, num_classes)
        )

    def forward(self, images_N3HW: Tensor) -> Tensor:
        """From (N, 3, 32, 32) float to (N, num_classes) logits."""
        return self.classifier(torch.flatten(self.features(images_N3HW), 1))  # type: ignore[no-any-return]


def list_networks() -> list[str]:
    """Names that ``build_network`` takes."""
    return ["lenet", *torchvision.models.list_models(module=torchvision.models)]


def default_size(name: str) -> int:
    """Height and width in pixels that a network is made for."""
    return _SIZES.get(name, _SIZE)


def build_network(name: str, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    """A network with random weights.

    Args:
        name: ``lenet``, or one of torchvision's.
        num_classes: how many there are.
        image_size: height and width in pixels; a vision transformer must know it.

    Raises:
        TaskError: if there is no such network, or it does not take the size.
    """
    if name == "lenet":
        return LeNet(num_classes)
    options: dict[str, Any] = {"num_classes": num_classes}
    if name in _AUXILIARY:
        options |= {"aux_logits": True, "init_weights": True}
    if name.startswith("vit_"):
        options["image_size"] = image_size[0]
    try:
        network: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    except (ValueError, TypeError, AssertionError) as error:
        raise TaskError(f"classify cannot build {name}: {error}") from error
    return network
