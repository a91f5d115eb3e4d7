"""Between a replica and the host memory in which servers read sums and write versions; on a CPU they are the same."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from paramserver.client import Client
from paramserver.errors import ConfigError
from paramserver.partition import Slice
from workers.device import launches_block
from workers.gates import Gates
from workers.queued_versions import QueuedVersions, ranges
from workers.replica import Replica

__all__ = ["HostMemory", "PinnedMemory", "host_memory"]


def host_memory(replica: Replica, client: Client, *, queues: bool = False) -> "HostMemory":
    """The kind that the replica's device needs; ``queues``: see ``PinnedMemory``."""
    if replica.device.type == "cpu":
        return HostMemory(replica, client)
    return PinnedMemory(replica, client, queues=queues)


class HostMemory:
    """A CPU's: sums are made where servers read them, versions are read where servers write them; nothing is copied.

    Args:
        replica: the model.
        client: its way to the servers.
    """

    copies = False
    """Whether sums are copied to where servers read them."""
    queues = False
    """Whether ``show`` makes the device wait for the version expected, and not the host."""

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

    def computed(self) -> Callable[[], None]:
        """What waits until the device is done with all that was asked of it before this call."""
        return _nothing

    def expect(self, version: int, groups: Sequence[Sequence[Slice]]) -> None:
        """All is pushed: ``version`` comes next. What can be done for its ``pull`` is done while servers work.

        Args:
            version: the next one.
            groups: all slices, in the order in which they were pushed.
        """
        vector = self._client.vector(version)
        if vector is not None:
            self._replica.point_to(vector)

    def settle(self) -> None:
        """Wait for what ``expect`` has begun to wait for elsewhere."""

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
        """Wait until slices stand at ``version`` in the replica, where it has them in place."""
        self._client.await_slices(version, slices)

    def release(self) -> None:
        """Let nothing wait any more for what is expected: the client is closed after this, and ``close`` follows."""

    def close(self) -> None:
        """Give everything back."""


def _nothing() -> None: ...


class PinnedMemory(HostMemory):
    """A GPU's: sums go down on a stream of their own while backward computes, versions come up on another one.

    Nothing waits for the whole device: kernels that read what was brought are queued behind the copy, and who sends
    waits for the event behind it. A version's memory is not written again before this worker's next push, which waits
    for kernels that come after the copy; a sum's is not before the commit.

    Args:
        replica: the model.
        client: its way to the servers.
        queues: whether versions are to be queued before they are committed, where that is possible.
    """

    copies = True

    def __init__(self, replica: Replica, client: Client, *, queues: bool = False) -> None:
        super().__init__(replica, client)
        self._stream = torch.cuda.Stream(replica.device)  # type: ignore[no-untyped-call]
        self._twins: dict[int, Tensor] = {}
        self._pinned: list[Tensor] = []
        self._queued: QueuedVersions | None = None
        try:
            host = [self._pin(vector) for version in (0, 1) if (vector := client.vector(version)) is not None]
            if queues and len(host) == 2 and Gates.exist() and not launches_block():
                self._queued = QueuedVersions(replica, client, (host[0], host[1]), self.begin_thread)
        except BaseException:
            self.close()
            raise
        self.queues = self._queued is not None

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
            for start, stop in ranges(slices):
                host[start:stop].copy_(vector[start:stop], non_blocking=True)
            return _wait_for(self._stream)

    def computed(self) -> Callable[[], None]:
        """See ``HostMemory.computed``."""
        return _wait_for(torch.cuda.current_stream(self._replica.device))

    def expect(self, version: int, groups: Sequence[Sequence[Slice]]) -> None:
        """See ``HostMemory.expect``: kernels under way still read what stands in the replica."""
        if self._queued is not None:
            self._queued.expect(version, groups)

    def settle(self) -> None:
        """See ``HostMemory.settle``."""
        if self._queued is not None:
            self._queued.settle()

    def begin_thread(self) -> None:
        """See ``HostMemory.begin_thread``: it would use the first GPU."""
        torch.cuda.set_device(self._replica.device)

    def pull(self, version: int) -> Mapping[str, Tensor]:
        """See ``HostMemory.pull``."""
        read = self._client.read(version)
        if read is None:
            return self._client.pull(version, self._replica.values)
        if self._queued is not None:
            self._queued.show(version)
        if self._queued is None or self._queued.expected != version:
            self._replica.values.copy_(read[0], non_blocking=True)
        return read[1]

    def show(self, version: int) -> None:
        """See ``HostMemory.show``."""
        assert self._queued is not None
        self._queued.show(version)

    def release(self) -> None:
        """See ``HostMemory.release``."""
        if self._queued is not None:
            self._queued.release()

    def close(self) -> None:
        """See ``HostMemory.close``: pages stay locked until no copy can need them."""
        torch.cuda.synchronize(self._replica.device)
        if self._queued is not None:
            self._queued.close()
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        for vector in self._pinned:
            cudart.cudaHostUnregister(vector.data_ptr())
        self._pinned.clear()


def _wait_for(stream: torch.cuda.Stream) -> Callable[[], None]:
    """What waits until a stream has come where it is now."""
    there = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # servers want the core
    there.record(stream)
    return there.synchronize
