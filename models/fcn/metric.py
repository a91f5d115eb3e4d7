"""Pixel accuracy, mean accuracy and mean intersection over union of a whole data set."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from models.data.voc_classes import VOID
from models.task import Batch

__all__ = ["SegmentationMetric"]


class SegmentationMetric:
    """One confusion matrix over the data set, as VOC counts it: not a mean of images' values.

    Source: Long, Shelhamer and Darrell, CVPR 2015, section 5. A state of it is a matrix of integers, so merging is
    exact in any order.

    Args:
        class_names: names by label, background first.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = tuple(class_names)
        self.confusion_KK = torch.zeros(len(self.class_names), len(self.class_names), dtype=torch.int64)
        """Pixels by true label (row) and predicted label (column)."""

    def update(self, outputs: Tensor, batch: Batch) -> None:
        """Count a batch.

        Args:
            outputs: (N, H, W) integer labels, as ``FCNTask.predict`` returns.
            batch: its target ``mask`` is (N, H, W), ``VOID`` where nothing is labelled.
        """
        num_classes = len(self.class_names)
        mask_NHW = batch.targets["mask"].to(outputs.device)
        labelled = mask_NHW != VOID
        # int64 before the product: labels are bytes.
        pairs = mask_NHW[labelled].long() * num_classes + outputs[labelled].long()
        counts = torch.bincount(pairs, minlength=num_classes**2)
        self.confusion_KK += counts.view(num_classes, num_classes).cpu()

    def merge(self, other: Self) -> None:
        """Add what ``other`` counted."""
        self.confusion_KK += other.confusion_KK

    def compute(self) -> dict[str, float]:
        """``pixel_accuracy``, ``mean_accuracy`` (over classes in the truth), ``mean_iou`` and ``iou/<class>``.

        Classes that occur neither in the truth nor in a prediction are left out. NaN if nothing was counted.
        """
        confusion_KK = self.confusion_KK.double()
        correct_K = confusion_KK.diagonal()
        truth_K, predicted_K = confusion_KK.sum(dim=1), confusion_KK.sum(dim=0)
        union_K = truth_K + predicted_K - correct_K
        in_truth, occurs = truth_K > 0, union_K > 0
        iou_K = correct_K / union_K
        values = {
            "pixel_accuracy": float(correct_K.sum() / truth_K.sum()),
            "mean_accuracy": float((correct_K[in_truth] / truth_K[in_truth]).mean()),
            "mean_iou": float(iou_K[occurs].mean()),
        }
        return values | {f"iou/{self.class_names[k]}": float(iou_K[k]) for k in occurs.nonzero().flatten().tolist()}
