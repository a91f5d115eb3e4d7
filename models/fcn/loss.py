"""Cross-entropy summed over the labelled pixels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.data.voc_classes import VOID
from models.task import LossSum

__all__ = ["segmentation_loss"]


def segmentation_loss(logits_NKHW: Tensor, mask_NHW: Tensor) -> LossSum:
    """Sum of the pixels' cross-entropies; the weight is the number of labelled pixels.

    Args:
        logits_NKHW: float class scores.
        mask_NHW: integer labels in ``0..K-1``, or ``VOID``.

    Returns:
        A total that is a true zero with zero gradients when no pixel is labelled.
    """
    # One row a pixel: CUDA has no deterministic kernel for the 2-D form (nll_loss2d), and in channels_last order
    # the rows are a view, which makes this the faster form too.
    logits_PK = logits_NKHW.permute(0, 2, 3, 1).reshape(-1, logits_NKHW.shape[1])
    labels_P = mask_NHW.reshape(-1)
    total = F.cross_entropy(logits_PK, labels_P.long(), ignore_index=VOID, reduction="sum")
    return LossSum(total, (labels_P != VOID).sum(dtype=torch.float64))
