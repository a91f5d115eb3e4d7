"""A worker as a hub knows it: its socket, and the memory that it has shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from paramserver.arena import Arena
from paramserver.errors import PartitionMismatch
from paramserver.integers import IntegerBlock
from paramserver.messages import Push
from paramserver.partition import Slice
from paramserver.transport.channel import Channel
from paramserver.transport.wire import Heard, Lasting, Place, VectorPlace, read_lasting

__all__ = ["Known", "Peer"]

_KEPT = 256
"""More kinds of pushes than a worker has, unless backward ends in ever another order."""


class Known(NamedTuple):
    """A kind of push of which a hub has made sense."""

    lasting: Lasting
    slices: Mapping[int, Tensor]


@dataclass
class Peer:
    """A connected worker."""

    channel: Channel
    arenas: dict[int, Arena] = field(default_factory=dict)
    known: dict[bytes, Known] = field(default_factory=dict)
    slots: dict[int, Known] = field(default_factory=dict)
    """By number, as the worker says it."""
    stuck: bool = False
    """Whether something waits until it reads."""
    watches: bool = False
    """Whether it wants to hear of slices before their commit."""

    def find(self, heard: Heard, pieces: Sequence[Slice]) -> Push:
        """The push with its tensors, which lie in this peer's arenas.

        Raises:
            PartitionMismatch: if it names memory that was not shown.
        """
        known = self.kind(heard, pieces)
        lasting = known.lasting
        return Push(
            lasting.run,
            heard.step,
            lasting.generation,
            lasting.worker,
            lasting.node,
            known.slices,
            heard.rows,
            IntegerBlock(lasting.layout, heard.integers),
        )

    def kind(self, heard: Heard, pieces: Sequence[Slice]) -> Known:
        """What is the same in every such push; see ``find``."""
        if heard.lasting is None:
            if (kept := self.slots.get(heard.slot)) is None:
                raise PartitionMismatch("push of a kind that was not told of before")
            return kept
        known = self.known.get(heard.lasting) or self._learn(heard.lasting, pieces)
        if heard.slot >= 0:
            self.slots[heard.slot] = known
        return known

    def _learn(self, data: bytes, pieces: Sequence[Slice]) -> Known:
        lasting = read_lasting(data)
        try:
            if isinstance(lasting.slices, VectorPlace):
                place, chosen = lasting.slices
                vector = self._tensor(place)
                ranges = {piece.index: slice(piece.start, piece.stop) for piece in pieces}
                slices = {index: vector[ranges[index]] for index in chosen}
            else:
                slices = {index: self._tensor(place) for index, place in lasting.slices.items()}
        except (KeyError, ValueError, AttributeError) as error:
            raise PartitionMismatch(f"push of worker {lasting.worker} names memory that it did not attach") from error
        if len(self.known) >= _KEPT:
            self.known.clear()
        known = self.known[data] = Known(lasting, slices)
        return known

    def _tensor(self, place: Place) -> Tensor:
        return self.arenas[place.arena].tensor(place.offset, place.numel, getattr(torch, place.dtype))
