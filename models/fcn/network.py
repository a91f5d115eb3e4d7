"""The fully convolutional network: ResNet-18, a 1x1 classifier and a learned upsampling by 32."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

__all__ = ["FCN", "MIN_SIZE", "FullyConvolutional", "bilinear_kernel", "check_size", "enlarged"]

MIN_SIZE = 32
"""Smallest height and width of an image in pixels: one cell of the last feature map."""

_STRIDE = 32
_BACKBONE_LAYERS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")


class FullyConvolutional(nn.Module):
    """Scores every pixel; what a subclass computes may reach beyond the images at the bottom and right."""

    def forward(self, images_N3HW: Tensor) -> Tensor:
        """Class scores of every pixel.

        Args:
            images_N3HW: float, height and width of at least 32.

        Returns:
            ``logits_NKHW`` of the images' size.

        Raises:
            ValueError: if the images are smaller than 32 pixels.
        """
        height, width = images_N3HW.shape[-2:]
        check_size(height, width)
        return self._logits(images_N3HW)[..., :height, :width]

    def _logits(self, images_N3HW: Tensor) -> Tensor:
        raise NotImplementedError


class FCN(FullyConvolutional):
    """FCN-32s on ResNet-18, initialised as in Dive into Deep Learning, section 14.11, but never downloaded.

    Source: Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015.
    The keys below ``backbone.`` are those of torchvision's ``resnet18``.

    Args:
        num_classes: K, background included.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        resnet = resnet18(weights=None)
        self.backbone = nn.Sequential(OrderedDict((name, getattr(resnet, name)) for name in _BACKBONE_LAYERS))
        self.classifier = nn.Conv2d(512, num_classes, kernel_size=1)
        # Output size of n cells: (n - 1) * 32 - 2 * 16 + 64 = 32 * n.
        self.upsample = nn.ConvTranspose2d(
            num_classes, num_classes, kernel_size=2 * _STRIDE, stride=_STRIDE, padding=_STRIDE // 2
        )
        nn.init.xavier_uniform_(self.classifier.weight)
        # d2l leaves this bias at its random start; at zero the first upsampling is exactly bilinear.
        nn.init.zeros_(self.upsample.bias)  # type: ignore[arg-type]
        with torch.no_grad():
            self.upsample.weight.copy_(bilinear_kernel(num_classes, 2 * _STRIDE))

    def _logits(self, images_N3HW: Tensor) -> Tensor:
        scores_NKhw = self.classifier(self.backbone(images_N3HW))  # h = ceil(H / 32)
        # Of other sizes than multiples of 32 up to 31 pixels too many.
        logits_NKHW: Tensor = self.upsample(scores_NKhw)
        return logits_NKHW


def check_size(height: int, width: int) -> None:
    """See that images are large enough.

    Raises:
        ValueError: if they are smaller than ``MIN_SIZE``.
    """
    if min(height, width) < MIN_SIZE:
        raise ValueError(f"an image of {height}x{width} pixels is too small: FCN needs {MIN_SIZE}x{MIN_SIZE} or more")


def bilinear_kernel(num_channels: int, kernel_size: int) -> Tensor:
    """Weights of a transposed convolution that upsamples each channel bilinearly.

    Matches ``bilinear_kernel`` of Dive into Deep Learning, section 14.11.3.

    Returns:
        (num_channels, num_channels, kernel_size, kernel_size) float32.
    """
    factor = (kernel_size + 1) // 2
    centre = factor - 1 if kernel_size % 2 == 1 else factor - 0.5
    ramp = 1 - (torch.arange(kernel_size, dtype=torch.float32) - centre).abs() / factor
    weight = torch.zeros(num_channels, num_channels, kernel_size, kernel_size)
    channels = torch.arange(num_channels)
    weight[channels, channels] = ramp[:, None] * ramp[None, :]
    return weight


def enlarged(scores_NKhw: Tensor, height: int, width: int) -> Tensor:
    """Bilinear upsampling in float32 as two matrix products.

    Matches ``F.interpolate`` with ``align_corners=False`` but for rounding. That one has no reproducible backward on
    CUDA: asked for one, it gathers and scatters every value four times.

    Args:
        scores_NKhw: float.
        height: of the result.
        width: of the result.

    Returns:
        (N, K, height, width) float32 in channels-last order.
    """
    with torch.autocast(scores_NKhw.device.type, enabled=False):
        rows = scores_NKhw.float().permute(0, 2, 3, 1)
        wide_NhWK = _ramps(rows.shape[2], width, rows.device) @ rows
        whole = _ramps(rows.shape[1], height, rows.device) @ wide_NhWK.flatten(2)
        return whole.view(len(rows), height, width, -1).permute(0, 3, 1, 2)


def _ramps(cells: int, length: int, device: torch.device) -> Tensor:
    """(length, cells): how much of each cell's value is in each of ``length`` points."""
    centres = (torch.arange(length, dtype=torch.float32, device=device) + 0.5) * (cells / length) - 0.5
    distances = centres.clamp_(0, cells - 1)[:, None] - torch.arange(cells, device=device)
    return (1 - distances.abs_()).clamp_(min=0)
