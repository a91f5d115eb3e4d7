"""Versions on their way up to a GPU: forward passes are queued behind parameters that servers have yet to write.

The host is a whole pass ahead of the device then, which never waits to be told what to do next. Nothing is read before
it is there, whichever way a model takes through its parameters: the pass begins when the last slice has come. Most of
them come up while backward still goes on.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from paramserver.client import Client
from paramserver.partition import Slice
from workers.gates import Gates
from workers.overlap import MOST_BUCKETS
from workers.replica import Replica

__all__ = ["QueuedVersions", "ranges"]


class QueuedVersions:
    """Two vectors on the device, of which one is read while the other takes the next version up.

    Args:
        replica: whose parameters are pointed to them; it holds the client's version.
        client: says when slices have been written.
        host: both versions where servers write them, with their pages locked.
        begin_thread: to be called first in another thread.
    """

    def __init__(
        self, replica: Replica, client: Client, host: tuple[Tensor, Tensor], begin_thread: Callable[[], None]
    ) -> None:
        self._replica = replica
        self._client = client
        self._host = host
        own = client.version % 2
        other = torch.zeros_like(replica.values)
        self._values = (other, replica.values) if own else (replica.values, other)
        self._stream = torch.cuda.Stream(replica.device)  # type: ignore[no-untyped-call]
        self._read = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._read.record(torch.cuda.current_stream(replica.device))
        self._come = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._gates = Gates(MOST_BUCKETS)
        self._thread = ThreadPoolExecutor(1, initializer=begin_thread)
        self._bringing: Future[None] | None = None
        self.expected = -1
        """The version that was asked for last."""

    def expect(self, version: int, groups: Sequence[Sequence[Slice]]) -> None:
        """Queue the way up of the version that is committed next, a group of slices after the other.

        All kernels that read the version before the committed one must have been queued before its ``show``.
        """
        assert len(groups) <= MOST_BUCKETS
        half = version % 2
        # First of all: should the driver not queue but wait, somebody must be there to open what it waits for.
        self._bringing = self._thread.submit(self._bring, version, groups)
        self._stream.wait_event(self._read)
        with torch.cuda.stream(self._stream):
            for gate, slices in enumerate(groups):
                self._gates.wait(self._stream, gate, version)
                for start, stop in ranges(slices):
                    self._values[half][start:stop].copy_(self._host[half][start:stop], non_blocking=True)
            self._come.record(self._stream)
        self.expected = version

    def _bring(self, version: int, groups: Sequence[Sequence[Slice]]) -> None:
        try:
            for gate, slices in enumerate(groups):
                self._client.await_slices(version, slices)
                self._gates.open(gate, version)
        except BaseException:
            self._gates.open_all()  # nobody will use what is computed then, but who waits for the device must not hang
            raise

    def show(self, version: int) -> None:
        """What is queued on the replica's stream from now on reads ``version``: the one expected, or what is there."""
        stream = torch.cuda.current_stream(self._replica.device)
        self._read.record(stream)  # whatever reads the other half is in the queue
        if version == self.expected:
            stream.wait_event(self._come)
        self._replica.point_to(self._values[version % 2])

    def settle(self) -> None:
        """Wait until all gates of the version that is expected are open.

        Raises:
            PushPullError: what became of the servers instead.
        """
        if self._bringing is not None:
            bringing, self._bringing = self._bringing, None
            bringing.result()

    def release(self) -> None:
        """Let the device go on, whatever has come; no version is to be expected any more."""
        self._gates.open_all()

    def close(self) -> None:
        """End the thread, which must not have anything to wait for any more; the device has been waited for."""
        self._thread.shutdown(cancel_futures=True)


def ranges(slices: Sequence[Slice]) -> Iterator[tuple[int, int]]:
    """Slices as ranges of the flat vector; neighbours are one."""
    ordered = sorted((piece.start, piece.stop) for piece in slices)
    for index, (start, stop) in enumerate(ordered):
        if index and ordered[index - 1][1] == start:
            continue
        end = stop
        for later_start, later_stop in ordered[index + 1 :]:
            if later_start != end:
                break
            end = later_stop
        yield start, end
