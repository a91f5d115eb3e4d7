"""Key -> slices -> server: a pure function of the keys, so that every participant computes the same one.

All keys of one run lie in one flat fp32 vector, group by group. A slice is a contiguous piece of one group; it may hold
many small keys or a part of a large one. Slices do not depend on the number of servers, only their placement does.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from paramserver.config import ALIGNMENT_BYTES, ServerConfig

__all__ = ["BUFFERS", "ELEMENT_BYTES", "Key", "KeySpec", "Partition", "Slice", "make_partition"]

BUFFERS = -1
"""Group of float buffers: no gradient, no optimizer, but a weighted mean of what microbatches made of them (E4)."""

ELEMENT_BYTES = 4
ALIGNMENT = ALIGNMENT_BYTES // ELEMENT_BYTES


@dataclass(frozen=True)
class KeySpec:
    """A parameter or float buffer as the model has it."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """In elements; dense, but not always row-major (channels_last)."""
    group: int
    """Parameter group, 0 or more, or ``BUFFERS``."""


@dataclass(frozen=True)
class Key(KeySpec):
    """A key with its place in the flat vector."""

    offset: int
    """First element, a multiple of ``ALIGNMENT``."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    def view(self, flat: Tensor) -> Tensor:
        """This key's part of a flat vector, with the key's shape and strides."""
        return flat.as_strided(self.shape, self.stride, flat.storage_offset() + self.offset)


@dataclass(frozen=True)
class Slice:
    """The unit of push, sum, update and pull: elements ``start`` to ``stop`` of the flat vector."""

    index: int
    group: int
    start: int
    stop: int
    server: int

    @property
    def numel(self) -> int:
        """Number of elements, a multiple of ``ALIGNMENT``."""
        return self.stop - self.start


@dataclass(frozen=True)
class Partition:
    """The flat vector, its slices, and who holds them."""

    keys: tuple[Key, ...]
    slices: tuple[Slice, ...]
    length: int
    """Elements of the flat vector, padding included."""
    num_servers: int

    @cached_property
    def hash(self) -> str:
        """What every participant compares before the first push."""
        return hashlib.sha256(repr((self.keys, self.slices, self.length)).encode()).hexdigest()

    @cached_property
    def by_server(self) -> tuple[tuple[Slice, ...], ...]:
        """Slices of each server, in the order of the flat vector."""
        return tuple(
            tuple(piece for piece in self.slices if piece.server == server) for server in range(self.num_servers)
        )

    @cached_property
    def pieces(self) -> tuple[tuple[tuple[Key, int, int], ...], ...]:
        """For each slice the keys in it with their range inside the slice, in key order; padding is left out."""
        found: list[list[tuple[Key, int, int]]] = [[] for _ in self.slices]
        for key in self.keys:
            for piece in self.slices:
                start, stop = max(key.offset, piece.start), min(key.offset + key.numel, piece.stop)
                if start < stop:
                    found[piece.index].append((key, start - piece.start, stop - piece.start))
        return tuple(tuple(keys) for keys in found)

    def flatten(self, values: Mapping[str, Tensor]) -> Tensor:
        """A new flat (length,) fp32 vector with ``values`` of all keys at their places and zeros between them."""
        flat = torch.zeros(self.length)
        for key in self.keys:
            key.view(flat).copy_(values[key.name])
        return flat

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a flat vector by key name, with the keys' shapes and strides."""
        return {key.name: key.view(flat) for key in self.keys}

    def bytes_by_server(self) -> list[int]:
        """How many bytes each server holds."""
        return [sum(piece.numel for piece in pieces) * ELEMENT_BYTES for pieces in self.by_server]


def make_partition(specs: Iterable[KeySpec], config: ServerConfig) -> Partition:
    """Lay keys out group by group, cut each group into slices, and place the slices so that bytes are balanced.

    Keys of a group keep the order of ``specs``. Placement is longest-processing-time first: the largest slice goes to
    the server with the fewest bytes, ties to the lower index (Graham 1969; at most 4/3 of the best balance).
    """
    ordered = sorted(specs, key=lambda spec: spec.group if spec.group != BUFFERS else 1 << 30)
    keys: list[Key] = []
    bounds: list[tuple[int, int, int]] = []
    slice_elements = config.slice_bytes // ELEMENT_BYTES
    offset = 0
    for group in dict.fromkeys(spec.group for spec in ordered):
        start = offset
        for spec in ordered:
            if spec.group == group:
                keys.append(Key(spec.name, spec.shape, spec.stride, spec.group, offset))
                offset += -(-keys[-1].numel // ALIGNMENT) * ALIGNMENT
        bounds.extend((group, lo, min(lo + slice_elements, offset)) for lo in range(start, offset, slice_elements))
    owners = _balance([stop - start for _, start, stop in bounds], config.num_servers)
    slices = tuple(
        Slice(index, group, start, stop, owner)
        for index, ((group, start, stop), owner) in enumerate(zip(bounds, owners, strict=True))
    )
    return Partition(tuple(keys), slices, offset, config.num_servers)


def _balance(sizes: Sequence[int], num_servers: int) -> list[int]:
    load = [0] * num_servers
    owner = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        owner[index] = load.index(min(load))
        load[owner[index]] += sizes[index]
    return owner
