"""What a server's next update will be if workers push what they have pushed last: known before anything arrives."""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

from paramserver.fused import Pass

__all__ = ["Divisor", "PlannedBucket", "PlannedChunk", "RoundPlan"]


class Divisor(NamedTuple):
    """A number in a planned chunk that is known once all rows are."""

    address: int
    """Of a fp32 number."""
    counts_samples: bool
    """Whether it is the number of samples, or else the sum of weights; at least 1."""


class PlannedChunk(NamedTuple):
    """One chunk of the update."""

    function: Pass
    chunk: ctypes.Structure
    """For ``Work``, but for the divisor."""
    divisor: Divisor


class PlannedBucket(NamedTuple):
    """Slices that are pushed together, and updated once everybody has pushed them."""

    slices: Sequence[int]
    chunks: Sequence[PlannedChunk]


class RoundPlan(NamedTuple):
    """The update of an open step; good until the server is touched."""

    version: int
    """That it makes."""
    buckets: Sequence[PlannedBucket]
    """In the order in which they come."""
    record: bytes
    """As ``pack_commit`` makes it, but for rows, last worker, integer buffers, flags and times."""
    kept: int
    """Address where a record of this length is kept, behind its length."""
    kept_version: int
    """Address of the word that is ``version + 1`` once it is."""
    begun: int
    """Address of the word that is ``version + 1`` once something of it is written."""
