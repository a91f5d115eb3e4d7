"""TinySSD: five feature maps, and on each a class and a box predictor."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.ssd.anchors import ANCHORS_PER_POSITION

__all__ = ["TinySSD"]


class TinySSD(nn.Module):
    """The network of "Dive into Deep Learning", section 14.7, without its anchors (see ``models.ssd.anchors``).

    Initialised as PyTorch initialises convolutions; 1,010,376 parameters with one class.

    Args:
        num_classes: number of classes without background.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        base = nn.Sequential(_down_sample(3, 16), _down_sample(16, 32), _down_sample(32, 64))
        self.blocks = nn.ModuleList([base, _down_sample(64, 128), _down_sample(128, 128), _down_sample(128, 128)])
        channels = (64, 128, 128, 128, 128)
        self.class_heads = nn.ModuleList(_head(c, ANCHORS_PER_POSITION * (num_classes + 1)) for c in channels)
        self.box_heads = nn.ModuleList(_head(c, ANCHORS_PER_POSITION * 4) for c in channels)

    def forward(self, images_N3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Class scores and box offsets of every anchor.

        Args:
            images_N3HW: (N, 3, H, W) float, H and W at least ``MIN_IMAGE_SIDE``.

        Returns:
            ``scores_NAK``, (N, A, num_classes + 1) logits with background first, and ``offsets_NA4``, (N, A, 4)
            relative to the anchors (see ``models.ssd.offsets``); A in the order of ``anchors(H, W)``.
        """
        features = images_N3HW
        maps = []
        for block in self.blocks:
            features = block(features)
            maps.append(features)
        # d2l pools with AdaptiveMaxPool2d((1, 1)); the same bits, but its backward on CUDA is not deterministic.
        maps.append(F.max_pool2d(features, kernel_size=(features.shape[-2], features.shape[-1])))
        scores = [_by_position(head(x)) for head, x in zip(self.class_heads, maps, strict=True)]
        offsets = [_by_position(head(x)) for head, x in zip(self.box_heads, maps, strict=True)]
        num_images = images_N3HW.shape[0]
        scores_NAK = torch.cat(scores, dim=1).view(num_images, -1, self.num_classes + 1)
        return scores_NAK, torch.cat(offsets, dim=1).view(num_images, -1, 4)


def _down_sample(in_channels: int, out_channels: int) -> nn.Sequential:
    """Two convolutions with batch norm, then half the height and width."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


def _head(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


def _by_position(prediction_NCHW: Tensor) -> Tensor:
    """(N, H * W * C): all channels of a position together; no copy when the input is channels-last."""
    return prediction_NCHW.permute(0, 2, 3, 1).flatten(start_dim=1)
