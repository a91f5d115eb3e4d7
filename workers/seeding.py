"""Random numbers that depend on ``(seed, epoch, sample)`` or ``(seed, step, microbatch)`` and on nothing else (E3)."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["derive_seed", "seeded"]


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed out of labels and numbers, the same on every machine and in every version of Python."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def seeded(*parts: int | str, device: torch.device | None = None) -> Iterator[None]:
    """Run a block under freshly seeded global generators, then put the old ones back.

    Transforms and dropout take no generator, so the global ones are forked: torch's (and that of ``device``, if it is
    a GPU), NumPy's legacy one and Python's, since a user's own data set may draw from any of them.
    """
    seed = derive_seed(*parts)
    cuda = [device] if device is not None and device.type == "cuda" else []
    old_python, old_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=cuda):
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        torch.default_generator.manual_seed(seed)
        for gpu in cuda:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(old_python)
            np.random.set_state(old_numpy)
