"""FCN-32s, FCN-16s and FCN-8s on VGG16.

Source: Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015. As in most
reimplementations fc6 is padded by 3, where the paper pads the image by 100 and crops.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torchvision.models import vgg16

from models.fcn.network import FullyConvolutional, bilinear_kernel

__all__ = ["FCNVGG"]

_POOLS = {3: 17, 4: 24, 5: 31}
"""By pool, how many of VGG16's layers end with it."""
_FINEST = {32: 5, 16: 4, 8: 3}
"""By the stride of the scores, the finest pool that is scored."""
_POOL_CHANNELS = {3: 256, 4: 512}
_HIDDEN = 4096


class FCNVGG(FullyConvolutional):
    """VGG16 with fc6 and fc7 as convolutions; scores of coarser maps are upsampled and added to those of finer ones.

    The keys below ``features.`` are those of torchvision's ``vgg16``; ``fc6`` and ``fc7`` are its ``classifier.0`` and
    ``classifier.3`` in another shape. Scores start at Xavier's values, those of skipped pools at zero, so that training
    begins with FCN-32s; upsampling starts bilinear (``--freeze 'upsample*'`` keeps it so).

    Args:
        num_classes: K, background included.
        stride: 32, 16 or 8: pixels of a cell of the finest scores.
    """

    def __init__(self, num_classes: int, stride: int) -> None:
        super().__init__()
        self.features = vgg16(weights=None).features
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                layer.ceil_mode = True  # so that upsampled maps are never smaller than finer ones
        self.fc6 = nn.Conv2d(512, _HIDDEN, kernel_size=7, padding=3)
        self.fc7 = nn.Conv2d(_HIDDEN, _HIDDEN, kernel_size=1)
        self.dropout = nn.Dropout(0.5)
        self.score = nn.Conv2d(_HIDDEN, num_classes, kernel_size=1)
        self.weight_aliases = {"classifier.0": "fc6", "classifier.3": "fc7"}
        """What torchvision's ``vgg16`` calls them."""
        self._finest = _FINEST[stride]
        skipped = range(4, self._finest - 1, -1)
        self.skip_scores = nn.ModuleDict(
            {f"pool{pool}": nn.Conv2d(_POOL_CHANNELS[pool], num_classes, kernel_size=1) for pool in skipped}
        )
        self.upsample_skips = nn.ModuleDict({f"pool{pool}": _upsampling(num_classes, 2) for pool in skipped})
        self.upsample = _upsampling(num_classes, stride)
        for layer in (self.fc6, self.fc7):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        nn.init.xavier_uniform_(self.score.weight)
        nn.init.zeros_(self.score.bias)  # type: ignore[arg-type]
        for parameter in self.skip_scores.parameters():
            nn.init.zeros_(parameter)

    def _logits(self, images_N3HW: Tensor) -> Tensor:
        *finer, coarsest = self._pools(images_N3HW)
        hidden = self.dropout(torch.relu(self.fc6(coarsest)))
        hidden = self.dropout(torch.relu(self.fc7(hidden)))
        scores_NKhw: Tensor = self.score(hidden)
        for (name, score), pool in zip(self.skip_scores.items(), reversed(finer), strict=True):
            up_NKhw = self.upsample_skips[name](scores_NKhw)
            scores_NKhw = up_NKhw[..., : pool.shape[-2], : pool.shape[-1]] + score(pool)
        logits_NKHW: Tensor = self.upsample(scores_NKhw)
        return logits_NKHW

    def _pools(self, images_N3HW: Tensor) -> Iterator[Tensor]:
        """The maps that are scored, finest first."""
        features, begin = images_N3HW, 0
        for pool, end in _POOLS.items():
            features = self.features[begin:end](features)
            begin = end
            if pool >= self._finest:
                yield features


def _upsampling(num_classes: int, factor: int) -> nn.ConvTranspose2d:
    """Bilinear at the start; n cells become ``factor * n``."""
    layer = nn.ConvTranspose2d(
        num_classes, num_classes, kernel_size=2 * factor, stride=factor, padding=factor // 2, bias=False
    )
    with torch.no_grad():
        layer.weight.copy_(bilinear_kernel(num_classes, 2 * factor))
    return layer
