"""How a box is written relative to an anchor, and read back."""

import torch
from torch import Tensor

__all__ = ["decode", "encode"]

_CENTRE_SCALE = 10.0  # one over d2l's (and SSD's) standard deviations 0.1 and 0.2
_SIZE_SCALE = 5.0
_EPS = 1e-6
_MAX_LOG_SIZE = 10.0  # 22,000 times the anchor: keeps a diverging network's boxes finite and changes no sensible one


def encode(anchors_A4: Tensor, boxes_NA4: Tensor, eps: float = _EPS) -> Tensor:
    """Offsets from anchors to boxes: d2l's ``offset_boxes``; with an ``eps`` of 0 torchvision's ``BoxCoder``.

    Args:
        anchors_A4: corners of the anchors.
        boxes_NA4: corners of the box meant for each anchor; any leading dimensions.
        eps: keeps the logarithm finite.

    Returns:
        (N, A, 4): ``10 * (centre - anchor's centre) / anchor's size``, ``5 * log(eps + size / anchor's size)``.
    """
    anchor_centre, anchor_size = _centre_and_size(anchors_A4)
    centre, size = _centre_and_size(boxes_NA4)
    xy = _CENTRE_SCALE * (centre - anchor_centre) / anchor_size
    wh = _SIZE_SCALE * torch.log(eps + size / anchor_size)
    return torch.cat((xy, wh), dim=-1)


def decode(anchors_A4: Tensor, offsets_NA4: Tensor) -> Tensor:
    """Boxes from anchors and offsets: d2l's ``offset_inverse``, the inverse of ``encode`` up to its eps.

    Returns:
        (N, A, 4) corners; they may reach outside of the image.
    """
    anchor_centre, anchor_size = _centre_and_size(anchors_A4)
    centre = offsets_NA4[..., :2] / _CENTRE_SCALE * anchor_size + anchor_centre
    half = torch.exp((offsets_NA4[..., 2:] / _SIZE_SCALE).clamp(max=_MAX_LOG_SIZE)) * anchor_size / 2
    return torch.cat((centre - half, centre + half), dim=-1)


def _centre_and_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    low, high = boxes[..., :2], boxes[..., 2:]
    return (low + high) / 2, high - low
