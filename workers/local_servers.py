"""Servers inside the worker's process, for ``single`` and for the update of ``ddp``."""

from paramserver.config import OptimizerConfig
from paramserver.partition import Partition
from paramserver.server import Server
from paramserver.state import State, assemble
from paramserver.transport.in_process import InProcessServers
from workers.replica import Replica

__all__ = ["LocalServers"]


class LocalServers:
    """One server that holds everything; its memory can be a CPU replica's parameters without a copy.

    Args:
        partition: of the model, with one server.
        optimizer: the optimizer.
        num_microbatches: ``M``.
        state: what to start from.
        threads: how many update.
    """

    def __init__(
        self, partition: Partition, optimizer: OptimizerConfig, num_microbatches: int, state: State, threads: int = 1
    ) -> None:
        assert partition.num_servers == 1
        self._server = Server(0, partition, optimizer, num_microbatches, state)
        self._partition = partition
        self.group = InProcessServers([self._server], threads)

    def load(self, replica: Replica, version: int) -> None:
        """Put ``version`` into a replica: pointed to on the CPU, copied to a GPU."""
        flat = self._server.flat(version)
        if replica.device.type == "cpu":
            replica.point_to(flat)
        else:
            replica.values.copy_(flat)
        replica.load(self._server.integers(version))

    def close(self) -> None:
        """End its threads."""
        self.group.close()

    def state(self) -> State:
        """A copy of everything at the committed version."""
        return assemble(self._partition, [self._server.snapshot(self._server.version, copy=False)])
