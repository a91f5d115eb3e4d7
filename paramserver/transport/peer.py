"""A worker as a hub knows it: its socket, and the memory that it has shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from paramserver.arena import Arena
from paramserver.errors import PartitionMismatch
from paramserver.messages import FlatSlices, Push
from paramserver.partition import Slice
from paramserver.transport.channel import Channel
from paramserver.transport.wire import Arrival, Place, VectorPlace

__all__ = ["Peer"]


@dataclass
class Peer:
    """A connected worker."""

    channel: Channel
    arenas: dict[int, Arena] = field(default_factory=dict)
    vectors: dict[Place, FlatSlices] = field(default_factory=dict)
    stuck: bool = False
    """Whether something waits until it reads."""
    watches: bool = False
    """Whether it wants to hear of slices before their commit."""

    def find(self, message: Arrival, pieces: Sequence[Slice]) -> Push:
        """The push with its tensors, which lie in this peer's arenas.

        Raises:
            PartitionMismatch: if it names memory that was not shown.
        """
        slices: Mapping[int, Tensor]
        try:
            if isinstance(message.slices, VectorPlace):
                place = message.slices.place
                if place not in self.vectors:  # the same few vectors come in every step
                    self.vectors[place] = FlatSlices(self._tensor(place), pieces)
                slices = {index: self.vectors[place][index] for index in message.slices.slices}
            else:
                slices = {index: self._tensor(place) for index, place in message.slices.items()}
        except (KeyError, ValueError, AttributeError) as error:
            worker = message.push.worker
            raise PartitionMismatch(f"push of worker {worker} names memory that it did not attach") from error
        return message.push._replace(slices=slices)

    def _tensor(self, place: Place) -> Tensor:
        return self.arenas[place.arena].tensor(place.offset, place.numel, getattr(torch, place.dtype))
