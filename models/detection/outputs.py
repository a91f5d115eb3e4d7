"""What a detector gives for a batch."""

from typing import NamedTuple

from torch import Tensor

__all__ = ["PADDING", "AnchorErrors", "DetectionOutputs", "Detections"]

PADDING = -1
"""The label of a row that only fills an image's boxes up to the batch's largest number of boxes."""


class Detections(NamedTuple):
    """Objects found in one image, best first."""

    boxes_D4: Tensor
    """(D, 4) float32 corners as parts of width and height; they may reach outside of 0..1, as in d2l."""
    scores_D: Tensor
    """(D,) float32 probabilities."""
    labels_D: Tensor
    """(D,) int64 classes from 0, without background."""
    masks_DHW: Tensor | None = None
    """(D, H, W) bool, of the size that the network saw; None of a detector without masks."""


class AnchorErrors(NamedTuple):
    """What the anchors of each image got wrong."""

    wrong_N: Tensor
    """(N,) int64: anchors whose most probable class is not the one they are to predict."""
    absolute_N: Tensor
    """(N,) float64: sum over anchors with a box of the absolute errors of their four offsets."""
    num_anchors: int
    """Anchors of an image."""


class DetectionOutputs(NamedTuple):
    """What ``predict`` gives for a batch."""

    detections: list[Detections]
    """One for each image."""
    errors: AnchorErrors | None
    """None for images without ground truth, and of a detector of whose anchors nobody asks."""
