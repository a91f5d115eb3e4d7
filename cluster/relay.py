"""The actor that stands on a node for the servers of other nodes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cluster.place import Place, place_of_process, prepare_process
from cluster.ray_transport import RayTransport
from cluster.rounding import Rounding
from paramserver.error_feedback import ErrorFeedback
from paramserver.partition import Partition
from paramserver.residuals import SliceResiduals
from paramserver.transport.channel import Address
from paramserver.transport.relay import Relay
from paramserver.transport.versions import share_versions

__all__ = ["RelayActor"]


class RelayActor:
    """Relays to servers elsewhere, one for each.

    Args:
        partition: of the run.
        num_microbatches: ``M``.
        threads: how many threads sum, for each server.
        arena_dir: where shared memory is made.
        timeout_s: deadline of each wait for a server.
    """

    def __init__(
        self, partition: Partition, num_microbatches: int, threads: int, arena_dir: str, timeout_s: float
    ) -> None:
        prepare_process()
        torch.set_num_threads(1)
        self._partition = partition
        self._num_microbatches = num_microbatches
        self._relays: dict[int, Relay] = {}
        self._threads = threads
        self._arena_dir = Path(arena_dir)
        self._timeout_s = timeout_s

    def place(self) -> Place:
        """Where this relay runs."""
        return place_of_process()

    def open(
        self,
        run: range,
        servers: Sequence[Any],
        far: Sequence[int],
        beside: Address | None,
        rounding: Rounding | None = None,
        least_version: int | None = None,
    ) -> dict[int, Address]:
        """Begin to serve; whoever was served before is turned out.

        Args:
            run: the node's microbatches.
            servers: handles of all servers.
            far: those to stand for.
            beside: address of a server of this node whose arena is to be shared; None makes one.
            rounding: how sums are rounded on their way, if they are.
            least_version: where the servers stand that are furthest behind.

        Returns:
            Where workers of this node connect, by server.
        """
        for relay in self._relays.values():
            relay.close()
        self._versions = versions = share_versions(beside, self._partition, self._arena_dir)
        self._feedback = {server: self._new_feedback(server, rounding) for server in far} if rounding else {}
        self._relays = {
            server: Relay(
                server,
                self._partition,
                self._num_microbatches,
                run,
                RayTransport(servers, self._feedback.get(server), self._timeout_s),
                versions,
                threads=self._threads,
                timeout_s=self._timeout_s,
                least_version=least_version,
            )
            for server in far
        }
        return {server: relay.address for server, relay in self._relays.items()}

    def _new_feedback(self, server: int, rounding: Rounding) -> ErrorFeedback:
        """One a relay: each goes from step to step by itself."""
        own = {
            (index, node): value
            for (index, node), value in rounding.residuals.items()
            if self._partition.slices[index].server == server
        }
        return ErrorFeedback(rounding.precision, self._partition, own, rounding.held_versions)

    def noted(self, worker: int) -> int:
        """What a worker of this node has said of where it is."""
        return self._versions.noted(worker)

    def missing(self) -> list[int]:
        """The node's microbatches that have not arrived here."""
        return sorted({index for relay in self._relays.values() for index in relay.missing()})

    def residuals(self, version: int, *, release: bool) -> SliceResiduals:
        """See ``ErrorFeedback.residuals``: of all servers that this stands for."""
        found = [feedback.residuals(version, release=release) for feedback in self._feedback.values()]
        return {place: value for part in found for place, value in part.items()}
