"""Checksums of slices, key by key: what a worker holds is compared with what its servers committed."""

import zlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from paramserver.errors import ReplicaMismatch
from paramserver.partition import Partition, Slice

__all__ = ["Checksums", "checksums_of", "crc32_of", "verify"]

Checksums = tuple[tuple[int, tuple[int, ...]], ...]
"""For each slice its index, and the CRC-32 of each key's piece in it, in key order."""


def crc32_of(array: Any) -> int:
    """CRC-32 of a contiguous NumPy array's bytes."""
    return zlib.crc32(array)


def checksums_of(partition: Partition, flat: Tensor, pieces: Sequence[Slice]) -> Checksums:
    """Checksums of slices of a flat (length,) fp32 vector on the CPU; padding does not count."""
    return tuple(
        (
            piece.index,
            tuple(
                crc32_of(flat[piece.start + first : piece.start + last].numpy())
                for _, first, last in partition.pieces[piece.index]
            ),
        )
        for piece in pieces
    )


def verify(partition: Partition, flat: Tensor, wanted: Checksums, step: int, who: str) -> None:
    """See that a flat (length,) vector is what its servers committed.

    Raises:
        ReplicaMismatch: naming the first key that is not, and the step that wrote it.
    """
    pieces = [partition.slices[index] for index, _ in wanted]
    for (index, known), (_, found) in zip(wanted, checksums_of(partition, flat, pieces), strict=True):
        for (key, first, last), want, has in zip(partition.pieces[index], known, found, strict=True):
            if want != has:
                raise ReplicaMismatch(
                    f"{who} does not hold what its server committed in step {step}: {key.name!r} differs in elements "
                    f"{first} to {last} of slice {index} (--verify-every): memory or a line between them is damaged",
                    key=key.name,
                    step=step,
                )
