"""What rounding has left over, by tree node and key in a checkpoint, by slice and tree node where it is used."""

from collections.abc import Mapping

import torch
from torch import Tensor

from paramserver.partition import BUFFERS, Partition
from paramserver.reduction import Node

__all__ = ["Residuals", "SliceResiduals", "residuals_by_key", "residuals_by_slice"]

Residuals = Mapping[Node, Mapping[str, Tensor]]
"""fp32 tensors of the parameters' shapes; they know no slices and no servers, so that any number can take them up."""

SliceResiduals = Mapping[tuple[int, Node], Tensor]
"""(n,) fp32 by slice index and tree node."""


def residuals_by_key(partition: Partition, held: SliceResiduals) -> dict[Node, dict[str, Tensor]]:
    """Put slices together; one that is not there (it went over no wire) counts as zeros."""
    by_key = {}
    for node in sorted({node for _, node in held}):
        flat = torch.zeros(partition.length)
        for piece in partition.slices:
            if (piece.index, node) in held:
                flat[piece.start : piece.stop] = held[piece.index, node]
        by_key[node] = {key.name: key.view(flat).clone() for key in partition.keys if key.group != BUFFERS}
    return by_key


def residuals_by_slice(partition: Partition, residuals: Residuals) -> dict[tuple[int, Node], Tensor]:
    """Cut residuals into slices; those that are all zeros are left out, since nobody needs to take them up."""
    by_slice = {}
    for node, by_key in residuals.items():
        flat = torch.zeros(partition.length)
        for key in partition.keys:
            if key.name in by_key:
                key.view(flat).copy_(by_key[key.name])
        for piece in partition.slices:
            values = flat[piece.start : piece.stop]
            if values.any():
                by_slice[piece.index, node] = values.clone()
    return by_slice
