"""What a network's anchors get wrong: d2l's two errors."""

from torch import Tensor

from models.detection.outputs import AnchorErrors
from models.ssd.matching import Targets

__all__ = ["anchor_errors"]


def anchor_errors(scores_NAK: Tensor, offsets_NA4: Tensor, targets: Targets) -> AnchorErrors:
    """Sums of which d2l's ``cls_eval`` and ``bbox_eval`` are made, for each image."""
    wrong_N = (scores_NAK.argmax(dim=2) != targets.labels_NA).sum(dim=1)
    difference_NA4 = (offsets_NA4.float() - targets.offsets_NA4).masked_fill(~targets.mask_NA[..., None], 0.0)
    return AnchorErrors(wrong_N, difference_NA4.abs().double().sum(dim=(1, 2)), scores_NAK.shape[1])
