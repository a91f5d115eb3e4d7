"""From a network's predictions to the objects it has found."""

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from models.detection.outputs import Detections
from models.ssd.offsets import decode

__all__ = ["detect", "detect_by_class"]


@torch.no_grad()
def detect(
    anchors_A4: Tensor,
    scores_NAK: Tensor,
    offsets_NA4: Tensor,
    *,
    score_threshold: float = 0.05,
    iou_threshold: float = 0.5,
    max_detections: int = 200,
) -> list[Detections]:
    """Decode the predictions of a batch; an anchor stands for its most probable class, as in ``multibox_detection``.

    Overlapping boxes suppress each other within a class; d2l's single class makes no difference.

    Args:
        anchors_A4: corners of the anchors.
        scores_NAK: (N, A, K + 1) logits, background first.
        offsets_NA4: (N, A, 4) predicted offsets.
        score_threshold: what is not more probable than this is no detection.
        iou_threshold: of two boxes of a class that overlap more than this, the better stays.
        max_detections: how many are kept in an image.

    Returns:
        One ``Detections`` for each image.
    """
    best_NA, label_NA = scores_NAK.float().softmax(dim=2)[..., 1:].max(dim=2)
    boxes_NA4 = decode(anchors_A4, offsets_NA4.float())
    found = []
    for best_A, label_A, boxes_A4 in zip(best_NA, label_NA, boxes_NA4, strict=True):
        (above_C,) = torch.nonzero(best_A > score_threshold, as_tuple=True)
        scores_C, labels_C, boxes_C4 = best_A[above_C], label_A[above_C], boxes_A4[above_C]
        found.append(_without_overlaps(Detections(boxes_C4, scores_C, labels_C), iou_threshold, max_detections))
    return found


@torch.no_grad()
def detect_by_class(
    anchors_A4: Tensor,
    scores_NAK: Tensor,
    offsets_NA4: Tensor,
    *,
    score_threshold: float = 0.01,
    iou_threshold: float = 0.45,
    candidates: int = 400,
    max_detections: int = 200,
) -> list[Detections]:
    """Decode the predictions of a batch; an anchor may be found as several classes: torchvision's ``SSD``.

    Args:
        anchors_A4: corners of the anchors.
        scores_NAK: (N, A, K + 1) logits, background first.
        offsets_NA4: (N, A, 4) predicted offsets.
        score_threshold: what is not more probable than this is no detection.
        iou_threshold: of two boxes of a class that overlap more than this, the better stays.
        candidates: the best of each class that are looked at.
        max_detections: how many are kept in an image.

    Returns:
        One ``Detections`` for each image, with boxes cut to 0..1.
    """
    probable_NKA = scores_NAK.float().softmax(dim=2)[..., 1:].transpose(1, 2)
    boxes_NA4 = decode(anchors_A4, offsets_NA4.float()).clamp_(0.0, 1.0)
    best_NKC, box_NKC = probable_NKA.topk(min(candidates, probable_NKA.shape[2]), dim=2)
    label_KC = torch.arange(probable_NKA.shape[1], device=scores_NAK.device)[:, None].expand_as(best_NKC[0])
    found = []
    for best_KC, box_KC, boxes_A4 in zip(best_NKC, box_NKC, boxes_NA4, strict=True):
        above_KC = best_KC > score_threshold
        scores_C, labels_C, boxes_C4 = best_KC[above_KC], label_KC[above_KC], boxes_A4[box_KC[above_KC]]
        found.append(_without_overlaps(Detections(boxes_C4, scores_C, labels_C), iou_threshold, max_detections))
    return found


def _without_overlaps(candidates: Detections, iou_threshold: float, count: int) -> Detections:
    """The best that do not overlap a better one of their class."""
    boxes_C4, scores_C, labels_C, _ = candidates
    keep_D = batched_nms(boxes_C4, scores_C, labels_C, iou_threshold)[:count]
    return Detections(boxes_C4[keep_D], scores_C[keep_D], labels_C[keep_D])
