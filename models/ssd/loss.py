"""TinySSD's loss as a sum over images."""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ssd.matching import Targets
from models.task import LossSum

__all__ = ["ssd_loss"]


def ssd_loss(scores_NAK: Tensor, offsets_NA4: Tensor, targets: Targets) -> LossSum:
    """Per image, mean cross-entropy over anchors + mean L1 over 4 x anchors: d2l's ``calc_loss``, summed.

    The L1 counts anchors that have a box alone, but is divided by the number of all: with the number of matched anchors
    instead, d2l's learning rate of 0.2 diverges.

    Args:
        scores_NAK: (N, A, K + 1) logits, background first.
        offsets_NA4: (N, A, 4) predicted offsets.
        targets: what the anchors are to predict.

    Returns:
        The sum over images, attached to the graph also when no image has a box, and their number as weight.
    """
    num_images, num_anchors, _ = scores_NAK.shape
    classes_NA = F.cross_entropy(scores_NAK.float().flatten(0, 1), targets.labels_NA.flatten(), reduction="none")
    # Targets are 0 where the mask is 0. A masked fill, not a product: 0 * inf would be NaN.
    matched_NA4 = offsets_NA4.float().masked_fill(~targets.mask_NA[..., None], 0.0)
    boxes_N = (matched_NA4 - targets.offsets_NA4).abs().flatten(1).mean(dim=1)
    total = (classes_NA.view(num_images, num_anchors).mean(dim=1) + boxes_N).sum()
    return LossSum(total, total.new_full((), num_images, dtype=torch.float64))
