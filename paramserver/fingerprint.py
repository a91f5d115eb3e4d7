"""SHA-256 of a state: two runs are equal exactly if their fingerprints are."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["fingerprint"]


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over the tensors in sorted key order: name, dtype, shape, C-order little-endian bytes."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        # Viewed as bytes, since NumPy knows no bfloat16; every machine torch runs on is little-endian.
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
