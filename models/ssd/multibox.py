"""SSD's own matching and loss, as torchvision's ``SSD`` has them, for a whole batch at once and as sums."""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ssd.matching import Targets, iou
from models.ssd.offsets import encode
from models.task import LossSum

__all__ = ["match_targets", "multibox_loss"]

_NEGATIVES = 3
"""Background boxes that count, for each box that is matched."""


@torch.no_grad()
def match_targets(anchors_A4: Tensor, boxes_NG4: Tensor, labels_NG: Tensor, threshold: float = 0.5) -> Targets:
    """Classes and offsets for every default box: torchvision's ``SSDMatcher`` and ``BoxCoder``.

    A default box takes the object that it overlaps most if their IoU is at least ``threshold``; above that, every
    object gets the default box that overlaps it most, the last object first.

    Args:
        anchors_A4: corners of the default boxes.
        boxes_NG4: corners of the ground truth; G may be 0.
        labels_NG: int64 classes from 0; ``PADDING`` marks rows that are no box.
        threshold: the least IoU.
    """
    num_images, num_boxes = labels_NG.shape
    if num_boxes == 0:
        shape = (num_images, anchors_A4.shape[0])
        labels_NA = labels_NG.new_zeros(shape)
        return Targets(labels_NA, anchors_A4.new_zeros((*shape, 4)), labels_NA > 0)
    real_NG = labels_NG >= 0
    iou_NGA = iou(anchors_A4, boxes_NG4).masked_fill_(~real_NG[..., None], -1.0)
    overlap_NA, box_NA = iou_NGA.max(dim=1)
    box_NA.masked_fill_(overlap_NA < threshold, -1)
    best_NG = iou_NGA.argmax(dim=2)
    best_NG.masked_fill_(~real_NG, -1)
    index_A = torch.arange(anchors_A4.shape[0], device=anchors_A4.device)
    for i in range(num_boxes):  # one after the other: of two objects with the same best box the last one has it
        box_NA.masked_fill_(index_A == best_NG[:, i : i + 1], i)  # a reproducible scatter would sort first, on CUDA
    mask_NA = box_NA >= 0
    box_NA.clamp_(min=0)
    labels_NA = torch.where(mask_NA, labels_NG.gather(1, box_NA) + 1, 0)
    boxes_NA4 = boxes_NG4.gather(1, box_NA[..., None].expand(-1, -1, 4))
    # Of boxes that are masked: those of padding have no size, and 0 * inf is no 0.
    offsets_NA4 = encode(anchors_A4, boxes_NA4, eps=0.0).masked_fill_(~mask_NA[..., None], 0.0)
    return Targets(labels_NA, offsets_NA4, mask_NA)


def multibox_loss(scores_NAK: Tensor, offsets_NA4: Tensor, targets: Targets, alpha: float = 1.0) -> LossSum:
    """Cross-entropy + ``alpha`` x smooth L1 of matched boxes, summed; the weight is the number of matched boxes.

    Source: Liu et al., ECCV 2016, equation 1, and torchvision's ``SSD.compute_loss`` before its division by N. Of the
    background of each image only the three times as many boxes count as are matched, those with the largest loss.

    Args:
        scores_NAK: (N, A, K + 1) logits, background first.
        offsets_NA4: (N, A, 4) predicted offsets.
        targets: what the default boxes are to predict.
        alpha: weight of the boxes' loss.

    Returns:
        The sum, attached to the graph also when no image has a box, and the number of matched boxes.
    """
    classes_NA = F.cross_entropy(scores_NAK.float().flatten(0, 1), targets.labels_NA.flatten(), reduction="none")
    classes_NA = classes_NA.view_as(targets.labels_NA)
    # A masked fill, not a product: 0 * inf would be NaN.
    counted_NA = targets.mask_NA | _hard_negatives(classes_NA.detach(), targets.mask_NA)
    confidence = classes_NA.masked_fill(~counted_NA, 0.0).sum()
    matched_NA4 = offsets_NA4.float().masked_fill(~targets.mask_NA[..., None], 0.0)  # so are the targets there
    location = F.smooth_l1_loss(matched_NA4, targets.offsets_NA4, reduction="sum")
    return LossSum(confidence + alpha * location, targets.mask_NA.sum(dtype=torch.float64))


@torch.no_grad()
def _hard_negatives(losses_NA: Tensor, matched_NA: Tensor) -> Tensor:
    """(N, A) bool: the background boxes of each image with the largest losses; of equal ones the first."""
    count_N1 = (_NEGATIVES * matched_NA.sum(dim=1, keepdim=True)).clamp_(max=matched_NA.shape[1])
    losses_NA = losses_NA.masked_fill(matched_NA, -torch.inf)
    sorted_NA = losses_NA.sort(dim=1, descending=True, stable=True).values  # on a CPU by far the fastest
    least_N1 = sorted_NA.gather(1, (count_N1 - 1).clamp_(min=0))
    larger_NA, equal_NA = losses_NA > least_N1, losses_NA == least_N1
    left_N1 = count_N1 - larger_NA.sum(dim=1, keepdim=True)
    chosen_NA = larger_NA | (equal_NA & (equal_NA.cumsum(dim=1, dtype=torch.int32) <= left_N1))
    # What is no number is larger than all others, and must be seen.
    return (chosen_NA | losses_NA.isnan()) & (count_N1 > 0) & ~matched_NA
