"""Which way a worker takes to its servers: shared memory on its own node, or Ray."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.ray_transport import RayTransport
from paramserver.error_feedback import ErrorFeedback
from paramserver.partition import Partition
from paramserver.transport.channel import Address
from paramserver.transport.protocol import Transport
from paramserver.transport.shared_memory import SharedMemoryTransport

__all__ = ["route"]


def route(
    servers: Sequence[Any],
    addresses: Mapping[int, Address],
    partition: Partition,
    arena_dir: Path,
    feedback: ErrorFeedback | None = None,
    timeout_s: float = 300.0,
) -> Transport:
    """The transport of one worker.

    Args:
        servers: handles of all server actors.
        addresses: of all servers, or what stands for them on the worker's own node; empty takes Ray.
        partition: of the run.
        arena_dir: where the worker makes shared memory.
        feedback: rounds what goes through Ray; in shared memory there is no wire.
        timeout_s: deadline of a wait for the wire.
    """
    if addresses:
        return SharedMemoryTransport(addresses, partition, arena_dir)
    return RayTransport(servers, feedback, timeout_s)
