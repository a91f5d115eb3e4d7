"""The state of a run by key: what a checkpoint holds. Knows no slices and no servers, so any number can resume it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from paramserver.errors import ReplicaMismatch
from paramserver.partition import BUFFERS, Key, Partition
from paramserver.residuals import Residuals

__all__ = ["ServerSnapshot", "SliceSnapshot", "State", "assemble", "slice_optimizer_state"]


@dataclass(frozen=True)
class State:
    """Everything an update writes, by key."""

    version: int
    values: Mapping[str, Tensor]
    """Trained parameters and float buffers."""
    integers: Mapping[str, Tensor] = field(default_factory=dict)
    """Integer and boolean buffers."""
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    """Frozen keys."""
    optimizer: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """Optimizer state by key: tensors of the key's shape, and scalars. Empty before the first step."""
    residuals: Residuals = field(default_factory=dict)
    """What rounding on the wire has left over; no update writes it, and any run can go on without it."""

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters and buffers, as ``nn.Module.load_state_dict`` takes them."""
        return {**self.values, **self.integers, **self.constants}

    def everything(self) -> dict[str, Tensor]:
        """``state_dict`` and the optimizer's state, each entry as ``key/name``: what ``state_fingerprint`` covers."""
        optimizer = {f"{key}/{name}": value for key, values in self.optimizer.items() for name, value in values.items()}
        return {**self.state_dict(), **optimizer}


class SliceSnapshot(NamedTuple):
    """One slice at one version."""

    values: Tensor
    optimizer: Mapping[str, Tensor]

    def copied(self) -> "SliceSnapshot":
        """The same, in memory of its own."""
        return SliceSnapshot(self.values.clone(), {name: value.clone() for name, value in self.optimizer.items()})


class ServerSnapshot(NamedTuple):
    """One server's share of a state."""

    version: int
    slices: Mapping[int, SliceSnapshot]
    integers: Mapping[str, Tensor]
    constants: Mapping[str, Tensor]


def assemble(partition: Partition, snapshots: Iterable[ServerSnapshot]) -> State:
    """Put the servers' shares of one version together.

    Raises:
        ReplicaMismatch: if the shares are of different versions.
    """
    parts = list(snapshots)
    versions = {part.version for part in parts}
    if len(versions) != 1:
        raise ReplicaMismatch(f"servers gave versions {sorted(versions)} of one state")
    slices = {index: snapshot for part in parts for index, snapshot in part.slices.items()}
    return State(
        version=versions.pop(),
        values=_by_key(partition.keys, partition, {index: snapshot.values for index, snapshot in slices.items()}),
        integers={name: value for part in parts for name, value in part.integers.items()},
        constants={name: value for part in parts for name, value in part.constants.items()},
        optimizer=_optimizer_by_key(partition, slices),
    )


def _by_key(keys: Sequence[Key], partition: Partition, vectors: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """Tensors in the keys' shapes and strides, out of vectors by slice."""
    flats = {key.name: torch.zeros(key.numel) for key in keys}
    for index, vector in vectors.items():
        first = partition.slices[index].start
        for key, start, stop in partition.pieces[index]:
            place = first + start - key.offset
            flats[key.name][place : place + stop - start] = vector[start:stop]
    return {key.name: flats[key.name].as_strided(key.shape, key.stride) for key in keys}


def _optimizer_by_key(partition: Partition, slices: Mapping[int, SliceSnapshot]) -> dict[str, dict[str, Tensor]]:
    by_key: dict[str, dict[str, Tensor]] = {}
    vectors: dict[str, dict[int, Tensor]] = {}
    for piece in partition.slices:
        for name, value in slices[piece.index].optimizer.items():
            if value.ndim:
                vectors.setdefault(name, {})[piece.index] = value
                continue
            scalar = value.clone()
            for key, _, _ in partition.pieces[piece.index]:
                by_key.setdefault(key.name, {})[name] = scalar
    trained = [key for key in partition.keys if key.group != BUFFERS]
    for name, found in vectors.items():
        for key_name, value in _by_key(trained, partition, found).items():
            by_key.setdefault(key_name, {})[name] = value
    return by_key


def slice_optimizer_state(partition: Partition, index: int, state: State) -> dict[str, Tensor]:
    """The optimizer state of slice ``index``, cut out of the state by key."""
    piece = partition.slices[index]
    cut: dict[str, Tensor] = {}
    for key, start, stop in partition.pieces[index]:
        for name, value in state.optimizer.get(key.name, {}).items():
            if value.ndim == 0 and key.numel and name == "step":
                cut[name] = value
                continue
            first = piece.start + start - key.offset
            if name not in cut:
                cut[name] = torch.zeros(piece.numel)
            cut[name][start:stop] = _in_memory_order(key, value)[first : first + stop - start]
    return cut


def _in_memory_order(key: Key, value: Tensor) -> Tensor:
    """A key's tensor as its slices see it: (numel,), not row-major under channels_last."""
    if value.is_contiguous() and value.stride() == key.stride:
        return value.view(-1)  # no copy of a large key for each of its slices
    flat = torch.empty(key.numel)
    flat.as_strided(key.shape, key.stride).copy_(value)
    return flat
