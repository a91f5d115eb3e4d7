"""Which slices are whole while backward is still under way, and when to send them: in a few buckets, not one by one."""

from collections.abc import Callable, Sequence

from paramserver.partition import BUFFERS, Partition, Slice

__all__ = ["MOST_BUCKETS", "ReadySlices"]

_SHARES = (0.5, 0.8, 0.95)
"""Of all elements, at which a bucket goes out: the last one, whose update nothing hides, is small."""
_LEAST_ELEMENTS = 1 << 21
"""8 MiB: a server sums and updates less than that in the time that a few more messages take."""
_COPIED_SHARES = (0.2, 0.4, 0.6, 0.8, 0.93, 0.99)
_LEAST_COPIED_ELEMENTS = 1 << 18
"""From a GPU, beside which servers have cores of their own: they begin early, so that they are done with all but the
last bucket's slices when backward is, and that one is small, since its way down, update and way up hide behind
nothing."""
MOST_BUCKETS = 1 + max(len(_SHARES), len(_COPIED_SHARES))
"""For all slices of a node."""


class ReadySlices:
    """Counts keys: a slice is whole once each key in it has its gradient. Buffers have theirs after forward.

    Args:
        partition: of the model.
        keys: names of the trained keys, by the index that ``done`` is called with.
        send: called with slices that have become whole, at most ``MOST_BUCKETS`` times for all of them.
        least_elements: what a bucket is worth sending for before backward is over; None: the usual.
        copies: whether slices are copied on their way.
    """

    def __init__(
        self,
        partition: Partition,
        keys: Sequence[str],
        send: Callable[[Sequence[Slice]], None],
        least_elements: int | None = None,
        *,
        copies: bool = False,
    ) -> None:
        self._slices = partition.slices
        self._send = send
        names = {name: index for index, name in enumerate(keys)}
        self._slices_of: list[list[int]] = [[] for _ in keys]
        self._keys_in = [0] * len(partition.slices)
        for piece, held in zip(partition.slices, partition.pieces, strict=True):
            if piece.group != BUFFERS:
                for key, _, _ in held:
                    self._slices_of[names[key.name]].append(piece.index)
                    self._keys_in[piece.index] += 1
        usual, shares = (_LEAST_COPIED_ELEMENTS, _COPIED_SHARES) if copies else (_LEAST_ELEMENTS, _SHARES)
        self._least = usual if least_elements is None else least_elements
        self._due = [int(share * partition.length) for share in shares]
        self._missing: list[int] = []
        self.active = False
        """Whether a node is being sent."""

    def begin(self) -> None:
        """The next backward makes a node whole; what holds buffers alone is whole now."""
        self.active = True
        self._missing = list(self._keys_in)
        self._ready = [piece for piece, count in zip(self._slices, self._missing, strict=True) if not count]
        self._elements = sum(piece.numel for piece in self._ready)
        self._sent = 0

    def done(self, key: int) -> None:
        """The gradient of a key is in its place."""
        for index in self._slices_of[key]:
            self._missing[index] -= 1
            if not self._missing[index]:
                self._ready.append(self._slices[index])
                self._elements += self._slices[index].numel
        if self._elements >= self._least:
            whole = self._sent + self._elements
            if any(self._sent < due <= whole for due in self._due):
                self._flush()

    def _flush(self) -> None:
        ready, self._ready = self._ready, []
        self._sent, self._elements = self._sent + self._elements, 0
        self._send(ready)

    def end(self) -> None:
        """Backward is over, so everything is whole; without any slice the rows go out alone."""
        if self.active:
            self.active = False
            if self._ready or not self._sent:
                self._flush()
