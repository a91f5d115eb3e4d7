"""SSD300: six feature maps with 8732 default boxes, on VGG16 as in the paper or on ResNet-50 as NVIDIA trains it.

Source: Liu et al., "SSD: Single Shot MultiBox Detector", ECCV 2016. The networks' parts are torchvision's.
"""

from collections import OrderedDict
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models.detection import ssd300_vgg16 as torchvision_ssd300
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSDHead

__all__ = ["FEATURE_MAPS", "SIZE", "SSD300", "default_boxes", "ssd300_resnet50", "ssd300_vgg16"]

SIZE = 300
"""Height and width in pixels of the images that these networks are made for."""
FEATURE_MAPS = (38, 19, 10, 5, 3, 1)
"""Height and width of the maps that boxes are predicted from."""
_GENERATOR = DefaultBoxGenerator(
    [[2], [2, 3], [2, 3], [2, 3], [2], [2]],
    # In pixels 21, 45, 99, 153, 207, 261 and 315: a map has its own scale, and the mean with the next one.
    scales=[0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05],
    steps=[8, 16, 32, 64, 100, 300],
)
_RESNET_LAYERS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")


@lru_cache(maxsize=4)
def default_boxes(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """The default boxes, in the order of the networks' predictions; the result must not be written to.

    Args:
        height: of the image, ``SIZE``.
        width: of the image, ``SIZE``.
        device: where the result lies; None means the CPU.

    Returns:
        (8732, 4) float32 corners x1, y1, x2, y2 as parts of width and height; some reach outside of 0..1.
    """
    with torch.inference_mode(False):  # what is cached must be usable in training, whoever asked for it first
        images = ImageList(torch.empty(1, 3, height, width), [(height, width)])
        (boxes_A4,) = _GENERATOR(images, [torch.empty(1, 1, side, side) for side in FEATURE_MAPS])
        unit_A4: Tensor = boxes_A4 / torch.tensor([width, height, width, height])
        return unit_A4.to(device)


class SSD300(nn.Module):
    """A backbone with six feature maps, and torchvision's two heads on each of them.

    Args:
        backbone: gives the maps in a dictionary.
        head: gives ``cls_logits`` and ``bbox_regression``.
        weight_aliases: what a file of the backbone's weights calls modules of it.
    """

    def __init__(
        self, backbone: nn.Module, head: SSDHead, weight_aliases: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        super().__init__()
        self.weight_aliases = weight_aliases
        self.backbone = backbone
        self.head = head

    def forward(self, images_N3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Class scores and box offsets of every default box.

        Args:
            images_N3HW: (N, 3, 300, 300) float.

        Returns:
            ``scores_NAK``, (N, 8732, num_classes + 1) logits with background first, and ``offsets_NA4``, (N, 8732, 4)
            relative to the default boxes (see ``models.ssd.offsets``).
        """
        found = self.head(list(self.backbone(images_N3HW).values()))
        return found["cls_logits"], found["bbox_regression"]


def ssd300_vgg16(num_classes: int) -> SSD300:
    """VGG16 with the L2 norm of conv4_3 and dilated fc6 and fc7; its keys are those of torchvision's ``ssd300_vgg16``.

    Args:
        num_classes: without background.
    """
    whole = torchvision_ssd300(weights=None, weights_backbone=None, num_classes=num_classes + 1)
    # Of vgg16, whose fifth block stands behind a pool of its own here.
    moved = {f"features.{24 + 2 * i}": f"extra.0.{1 + 2 * i}" for i in range(3)}
    return SSD300(whole.backbone, whole.head, moved)


def ssd300_resnet50(num_classes: int) -> SSD300:
    """ResNet-50 up to conv4_x, which keeps its resolution, and five blocks: the layout of NVIDIA's SSD300 v1.1.

    The keys below ``backbone.features.`` are those of torchvision's ``resnet50``.

    Args:
        num_classes: without background.
    """
    head = SSDHead(list(_RESNET_CHANNELS), _GENERATOR.num_anchors_per_location(), num_classes + 1)
    return SSD300(_ResNet50(), head)


_RESNET_CHANNELS = (1024, 512, 512, 256, 256, 256)
"""Of the feature maps."""
_RESNET_NARROW = (256, 256, 128, 128, 128)
"""Inside each added block."""


class _ResNet50(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        resnet = resnet50(weights=None)
        first = resnet.layer3[0]
        first.conv2.stride = first.downsample[0].stride = (1, 1)  # 38 x 38 cells instead of 19 x 19
        self.features = nn.Sequential(OrderedDict((name, getattr(resnet, name)) for name in _RESNET_LAYERS))
        about = zip(pairwise(_RESNET_CHANNELS), _RESNET_NARROW, strict=True)
        # The last two blocks lose a border instead of halving: 5 -> 3 -> 1.
        self.extra = nn.ModuleList(
            _block(before, narrow, after, halve=i < 3) for i, ((before, after), narrow) in enumerate(about)
        )

    def forward(self, images_N3HW: Tensor) -> dict[str, Tensor]:
        """The six maps, finest first."""
        maps = {"0": self.features(images_N3HW)}
        for i, block in enumerate(self.extra):
            maps[str(i + 1)] = block(maps[str(i)])
        return maps


def _block(before: int, narrow: int, after: int, *, halve: bool) -> nn.Sequential:
    """1x1 to few channels, then 3x3; both with batch norm."""
    stride, padding = (2, 1) if halve else (1, 0)
    block = nn.Sequential(
        nn.Conv2d(before, narrow, 1, bias=False),
        nn.BatchNorm2d(narrow),
        nn.ReLU(inplace=True),
        nn.Conv2d(narrow, after, 3, stride=stride, padding=padding, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(inplace=True),
    )
    for layer in block:
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
    return block
