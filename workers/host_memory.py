"""Between a replica and the host memory in which servers read sums and write versions; on a CPU they are the same."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from paramserver.client import Client
from paramserver.errors import ConfigError
from paramserver.partition import Slice
from workers.replica import Replica

__all__ = ["HostMemory", "PinnedMemory", "host_memory"]


def host_memory(replica: Replica, client: Client) -> "HostMemory":
    """The kind that the replica's device needs."""
    return HostMemory(replica, client) if replica.device.type == "cpu" else PinnedMemory(replica, client)


class HostMemory:
    """A CPU's: sums are made where servers read them, versions are read where servers write them; nothing is copied.

    Args:
        replica: the model.
        client: its way to the servers.
    """

    copies = False
    """Whether sums are copied to where servers read them."""

    def __init__(self, replica: Replica, client: Client) -> None:
        self._replica = replica
        self._client = client

    def new_sum(self) -> Tensor:
        """A zeroed flat (length,) vector on the replica's device, of which slices can be sent."""
        return self._client.allocate()

    def on_host(self, vector: Tensor) -> Tensor:
        """Where servers read a ``new_sum``."""
        return vector

    def send(self, vector: Tensor, slices: Sequence[Slice]) -> Callable[[], None]:
        """Begin to bring slices of a ``new_sum`` to ``on_host``; what it returns waits until they are there."""
        return _nothing

    def expect(self, version: int) -> None:
        """All is pushed: ``version`` comes next. What can be done for its ``pull`` is done while servers work."""
        vector = self._client.vector(version)
        if vector is not None:
            self._replica.point_to(vector)

    def begin_thread(self) -> None:
        """To be called first in another thread that waits for what is sent."""

    def pull(self, version: int) -> Mapping[str, Tensor]:
        """Make the committed ``version`` the replica's; gives the integer buffers."""
        read = self._client.read(version)
        if read is None:
            return self._client.pull(version, self._replica.values)
        self._replica.point_to(read[0])
        return read[1]

    def show(self, version: int) -> None:
        """Make a version the replica's that is only being written: its slices are to be brought."""
        vector = self._client.vector(version)
        assert vector is not None
        self._replica.point_to(vector)

    def bring(self, version: int, slices: Sequence[Slice]) -> None:
        """Wait until slices stand at ``version`` in the replica."""
        self._client.await_slices(version, slices)

    def close(self) -> None:
        """Give everything back."""


def _nothing() -> None: ...


class PinnedMemory(HostMemory):
    """A GPU's: sums go down on a stream of their own while backward computes, versions come up on the replica's stream.

    Nothing waits for the whole device: kernels that read what was brought are queued behind the copy, and who sends
    waits for the event behind it. A version's memory is not written again before this worker's next push, which waits
    for kernels that come after the copy; a sum's is not before the commit.
    """

    copies = True

    def __init__(self, replica: Replica, client: Client) -> None:
        super().__init__(replica, client)
        self._stream = torch.cuda.Stream(replica.device)  # type: ignore[no-untyped-call]
        self._twins: dict[int, Tensor] = {}
        self._pinned: list[Tensor] = []
        for version in (0, 1):
            vector = client.vector(version)
            if vector is not None:
                self._pin(vector)

    def _pin(self, vector: Tensor) -> Tensor:
        """The vector, with its pages locked: only then a copy does not wait.

        Raises:
            ConfigError: if the system does not allow it.
        """
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        num_bytes = vector.numel() * vector.element_size()
        status = int(cudart.cudaHostRegister(vector.data_ptr(), num_bytes, 0))
        if status:
            raise ConfigError(
                f"CUDA error {status}: cannot lock {num_bytes / (1 << 20):.1f} MiB of host memory for copies: "
                "let fewer workers share this machine, or say --device cpu"
            )
        self._pinned.append(vector)
        return vector

    def new_sum(self) -> Tensor:
        """See ``HostMemory.new_sum``."""
        vector = torch.zeros_like(self._replica.values)
        self._twins[vector.data_ptr()] = self._pin(self._client.allocate())
        return vector

    def on_host(self, vector: Tensor) -> Tensor:
        """See ``HostMemory.on_host``."""
        return self._twins[vector.data_ptr()]

    def send(self, vector: Tensor, slices: Sequence[Slice]) -> Callable[[], None]:
        """See ``HostMemory.send``: what was queued before this call is in it."""
        host = self.on_host(vector)
        self._stream.wait_stream(torch.cuda.current_stream(self._replica.device))
        with torch.cuda.stream(self._stream):
            for start, stop in _runs(slices):
                host[start:stop].copy_(vector[start:stop], non_blocking=True)
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # servers want the core
            done.record(self._stream)
        return done.synchronize

    def expect(self, version: int) -> None:
        """See ``HostMemory.expect``: kernels under way still read what stands here."""

    def begin_thread(self) -> None:
        """See ``HostMemory.begin_thread``: it would use the first GPU."""
        torch.cuda.set_device(self._replica.device)

    def pull(self, version: int) -> Mapping[str, Tensor]:
        """See ``HostMemory.pull``."""
        read = self._client.read(version)
        if read is None:
            return self._client.pull(version, self._replica.values)
        self._replica.values.copy_(read[0], non_blocking=True)
        return read[1]

    def show(self, version: int) -> None:
        """See ``HostMemory.show``: the replica's own memory takes the new version up, slice by slice."""

    def bring(self, version: int, slices: Sequence[Slice]) -> None:
        """See ``HostMemory.bring``: the copies are queued when this returns."""
        super().bring(version, slices)
        vector = self._client.vector(version)
        assert vector is not None
        for start, stop in _runs(slices):
            self._replica.values[start:stop].copy_(vector[start:stop], non_blocking=True)

    def close(self) -> None:
        """See ``HostMemory.close``: pages stay locked until no copy can need them."""
        torch.cuda.synchronize(self._replica.device)
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        for vector in self._pinned:
            cudart.cudaHostUnregister(vector.data_ptr())
        self._pinned.clear()


def _runs(slices: Sequence[Slice]) -> Iterator[tuple[int, int]]:
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
