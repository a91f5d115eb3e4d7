"""Which anchor is to predict which ground truth box, for a whole batch at once."""

from typing import NamedTuple

import torch
from torch import Tensor

from models.ssd.offsets import encode

__all__ = ["Targets", "assign", "build_targets", "iou"]


class Targets(NamedTuple):
    """What every anchor of every image is to predict."""

    labels_NA: Tensor
    """(N, A) int64: class + 1, or 0 for background."""
    offsets_NA4: Tensor
    """(N, A, 4) float32, 0 where the anchor is background."""
    mask_NA: Tensor
    """(N, A) bool: the anchor has a box."""


@torch.no_grad()
def build_targets(anchors_A4: Tensor, boxes_NG4: Tensor, labels_NG: Tensor) -> Targets:
    """Classes and offsets for every anchor: d2l's ``multibox_target``.

    Args:
        anchors_A4: corners of the anchors.
        boxes_NG4: corners of the ground truth; G may be 0.
        labels_NG: int64 classes from 0; ``PADDING`` marks rows that are no box.
    """
    num_images, num_boxes = labels_NG.shape
    if num_boxes == 0:
        shape = (num_images, anchors_A4.shape[0])
        labels_NA = labels_NG.new_zeros(shape)
        return Targets(labels_NA, anchors_A4.new_zeros((*shape, 4)), labels_NA > 0)
    box_NA = assign(anchors_A4, boxes_NG4, labels_NG)
    mask_NA = box_NA >= 0
    box_NA.clamp_(min=0)  # background anchors take box 0, and are masked
    labels_NA = torch.where(mask_NA, labels_NG.gather(1, box_NA) + 1, 0)
    boxes_NA4 = boxes_NG4.gather(1, box_NA[..., None].expand(-1, -1, 4))
    return Targets(labels_NA, encode(anchors_A4, boxes_NA4).masked_fill_(~mask_NA[..., None], 0.0), mask_NA)


@torch.no_grad()
def assign(anchors_A4: Tensor, boxes_NG4: Tensor, labels_NG: Tensor, threshold: float = 0.5) -> Tensor:
    """Index of the ground truth box of every anchor: d2l's ``assign_anchor_to_bbox``, for a batch.

    An anchor takes the box that it overlaps most if their IoU is at least ``threshold``. Above that, every box gets an
    anchor: the pair with the largest IoU is matched, its anchor and box are taken out, and so on. Among equal IoU the
    first anchor wins, then the first box.

    Returns:
        (N, A) int64 indices into G; -1 for background.
    """
    num_boxes = labels_NG.shape[1]
    iou_NGA = iou(anchors_A4, boxes_NG4)
    iou_NGA.masked_fill_((labels_NG < 0)[..., None], -1.0)
    overlap_NA, box_NA = iou_NGA.max(dim=1)
    box_NA.masked_fill_(overlap_NA < threshold, -1)

    # Each box's best anchor is kept, and looked up again only when another box has taken that anchor.
    best_NG, anchor_NG = iou_NGA.max(dim=2)
    image_N = torch.arange(labels_NG.shape[0], device=labels_NG.device)
    order_G = torch.arange(num_boxes, device=labels_NG.device)
    for i in range(num_boxes):
        top_N = best_NG.amax(dim=1)
        rank_NG = anchor_NG * num_boxes + order_G
        rank_N = rank_NG.masked_fill_(best_NG < top_N[:, None], torch.iinfo(torch.int64).max).amin(dim=1)
        taken_N = rank_N // num_boxes
        chosen_N = rank_N % num_boxes
        # An image whose boxes are used up has only -1 left: it keeps what it has.
        box_NA[image_N, taken_N] = torch.where(top_N >= 0, chosen_N, box_NA[image_N, taken_N])
        if i + 1 == num_boxes:
            break
        iou_NGA[image_N, :, taken_N] = -1.0
        best_NG[image_N, chosen_N] = -1.0
        image_S, box_S = ((anchor_NG == taken_N[:, None]) & (best_NG >= 0)).nonzero(as_tuple=True)
        best_NG[image_S, box_S], anchor_NG[image_S, box_S] = iou_NGA[image_S, box_S].max(dim=1)
    return box_NA


def iou(anchors_A4: Tensor, boxes_NG4: Tensor) -> Tensor:
    """Intersection over union of every box with every anchor.

    Returns:
        (N, G, A), anchors last, since the search for the best anchor runs along them.
    """
    x1_A, y1_A, x2_A, y2_A = anchors_A4.unbind(dim=1)
    x1, y1, x2, y2 = boxes_NG4[..., None].unbind(dim=2)  # each (N, G, 1)
    width_NGA = torch.minimum(x2, x2_A).sub_(torch.maximum(x1, x1_A)).clamp_(min=0)
    height_NGA = torch.minimum(y2, y2_A).sub_(torch.maximum(y1, y1_A)).clamp_(min=0)
    intersection_NGA = width_NGA.mul_(height_NGA)
    union_NGA = ((x2 - x1) * (y2 - y1) + (x2_A - x1_A) * (y2_A - y1_A)).sub_(intersection_NGA)
    return intersection_NGA.div_(union_NGA)
