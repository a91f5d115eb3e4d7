"""Push and pull for one worker over all servers."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from paramserver.errors import PartitionMismatch, StaleContribution
from paramserver.messages import Commit, FlatSlices, MicrobatchStats, Push
from paramserver.partition import Partition, Slice
from paramserver.reduction import Node
from paramserver.transport.protocol import Transport

__all__ = ["Client"]


class Client:
    """Splits a worker's flat vectors among the servers and puts versions together again.

    Args:
        worker: index of the worker, for messages.
        partition: the run's partition; every server must have the same.
        transport: the way to the servers.
        timeout_s: deadline of each wait, in seconds (``--step-timeout``).
        generation: of the membership in which this worker has its microbatches; None: whatever the servers are in.

    Raises:
        PartitionMismatch: if a server has another partition.
        StaleContribution: if a server is in another generation: what this worker would push is somebody else's now.
    """

    def __init__(
        self, worker: int, partition: Partition, transport: Transport, timeout_s: float, generation: int | None = None
    ) -> None:
        self.worker = worker
        self.partition = partition
        self._transport = transport
        self._timeout_s = timeout_s
        hellos = [transport.hello(server, timeout_s) for server in range(transport.num_servers)]
        for server, hello in enumerate(hellos):
            if hello.partition_hash != partition.hash:
                raise PartitionMismatch(
                    f"worker {worker} and server {server} cut the parameters differently: they do not run the same "
                    "model, options or version of PushPull"
                )
            if generation is not None and hello.generation != generation:
                raise StaleContribution(
                    f"worker {worker} is of generation {generation}, server {server} of {hello.generation}"
                )
        self._run, self._generation = hellos[0].run, hellos[0].generation
        # A server that was lost may be one step behind the others: they answer what is pushed to it again.
        self.version = min(hello.version for hello in hellos)
        self.constants: Mapping[str, Tensor] = hellos[0].constants

    def push(
        self,
        step: int,
        node: Node,
        flat: Tensor,
        stats: tuple[MicrobatchStats, ...],
        integers: Mapping[str, Tensor],
        only: Sequence[Slice] | None = None,
    ) -> None:
        """Send the sums over ``node``: a flat (length,) fp32 vector that stays untouched until ``wait`` returns.

        With ``only`` just these slices, and the others by further calls; a server hears of those that concern it, and
        of all if it has no slice: it needs the rows.
        """
        self.prepare(step, node, flat, stats, integers, only)()

    def prepare(
        self,
        step: int,
        node: Node,
        flat: Tensor,
        stats: tuple[MicrobatchStats, ...],
        integers: Mapping[str, Tensor],
        only: Sequence[Slice] | None = None,
    ) -> Callable[[], None]:
        """As ``push``, which calling the result does: ``flat`` may be written until then."""
        sends = []
        for server, pieces in enumerate(self.partition.by_server):
            chosen = pieces if only is None else [piece for piece in only if piece.server == server]
            if pieces and not chosen:
                continue
            slices = FlatSlices(flat, chosen)
            held = integers if server == 0 else {}
            push = Push(self._run, step, self._generation, self.worker, node, slices, stats, held)
            sends.append(self._transport.prepare(server, push))
        return sends[0] if len(sends) == 1 else partial(_call_all, sends)

    def wait(self, version: int) -> Commit:
        """Wait until every server has committed ``version``; busy times are added up over the servers."""
        if self._transport.num_servers == 1:
            return self._transport.wait(0, version, self._timeout_s)
        deadline = time.monotonic() + self._timeout_s
        commits = [
            self._transport.wait(server, version, max(0.0, deadline - time.monotonic()))
            for server in range(self._transport.num_servers)
        ]
        stages = commits[0].server_ms
        busy = {stage: sum(commit.server_ms.get(stage, 0.0) for commit in commits) for stage in stages}
        return commits[0]._replace(
            server_ms=busy,
            generation=max(commit.generation for commit in commits),
            checksums=tuple(row for commit in commits for row in commit.checksums),
        )

    def pull(self, version: int, out: Tensor) -> Mapping[str, Tensor]:
        """Copy ``version`` into the flat (length,) fp32 vector ``out``; gives the integer buffers back."""
        integers: Mapping[str, Tensor] = {}
        for server, pieces in enumerate(self.partition.by_server):
            values, held = self._transport.fetch(server, version, self._timeout_s)
            for piece, value in zip(pieces, values, strict=True):
                out[piece.start : piece.stop].copy_(value, non_blocking=True)
            integers = integers or held  # one server alone has them
        if out.is_cuda:
            torch.cuda.current_stream(out.device).synchronize()
        return integers

    @property
    def shares_memory(self) -> bool:
        """Whether versions are read where the servers write them, and pushes cost a message alone."""
        return self._transport.versions is not None

    def read(self, version: int) -> tuple[Tensor, Mapping[str, Tensor]] | None:
        """The flat (length,) vector at ``version`` where the servers wrote it, and the integer buffers.

        None where it must be pulled. The vector is not to be written, and lasts until this worker has pushed its
        contribution to the step that follows.
        """
        vector = self.vector(version)
        if vector is None:
            return None
        integers = self._transport.fetch(0, version, self._timeout_s)[1]
        for server in range(1, self._transport.num_servers):
            held = self._transport.fetch(server, version, self._timeout_s)[1]
            integers = integers or held
        return vector, integers

    def vector(self, version: int) -> Tensor | None:
        """The flat (length,) vector of ``version`` where the servers write it, or None where it must be pulled.

        Unlike ``read`` this may be the version that is committed next: its slices are to be waited for.
        """
        versions = self._transport.versions
        return None if versions is None else versions[version % 2]

    def await_slices(self, version: int, pieces: Sequence[Slice]) -> None:
        """Wait until slices of ``vector(version)`` have been written; see ``Transport.await_slices``."""
        self._transport.await_slices(version, pieces, self._timeout_s)

    def allocate(self) -> Tensor:
        """A zeroed flat (length,) fp32 vector from which ``push`` is cheapest."""
        return self._transport.allocate(self.partition.length)

    def note(self, word: int) -> None:
        """Leave word of where this worker is; see ``Transport.note``."""
        self._transport.note(self.worker, word)

    def close(self) -> None:
        """Give the transport's resources back."""
        self._transport.close()


def _call_all(functions: Sequence[Callable[[], None]]) -> None:
    for function in functions:
        function()
