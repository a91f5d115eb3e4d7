"""Backend of a parameter-server worker: pull a version, send tree sums, wait for the commit."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from models.task import Metric
from paramserver.client import Client
from paramserver.messages import Commit, MicrobatchStats
from paramserver.reduction import Node, TreeSum
from workers.replica import Replica
from workers.timing import PhaseTimer

__all__ = ["ParamServerBackend"]


class ParamServerBackend:
    """Adds microbatches of this worker's run along the canonical tree and pushes the maximal nodes.

    Args:
        replica: this worker's model.
        client: its way to the servers.
        num_microbatches: ``M``.
    """

    def __init__(self, replica: Replica, client: Client, num_microbatches: int) -> None:
        self.version = client.version
        self.module: nn.Module = replica.model
        self._replica = replica
        self._client = client
        self._sums = TreeSum[Tensor](num_microbatches)
        self._stats: list[MicrobatchStats] = []
        self._integers: dict[str, Tensor] = {}
        self._free: list[Tensor] = []
        self._sent: list[Tensor] = []
        replica.load({}, client.constants)

    def pull(self, timer: PhaseTimer) -> None:
        """See ``Backend.pull``."""
        with timer.phase("pull"):
            self._replica.load(self._client.pull(self.version, self._replica.values))
            self._free += self._sent  # the step is committed: nobody reads these vectors any more
            self._sent.clear()

    @contextmanager
    def microbatch(self, index: int, *, last: bool) -> Iterator[None]:
        """See ``Backend.microbatch``."""
        self._replica.reset_buffers()
        yield

    def contribute(self, stats: MicrobatchStats, timer: PhaseTimer) -> None:
        """See ``Backend.contribute``."""
        with timer.phase("reduce"):
            leaf = self._take_vector()
            if stats.samples:
                self._replica.take_gradients(leaf)
                self._replica.take_buffer_changes(leaf, stats.samples)
                self._integers = self._replica.agreed_integers(self._integers)
            else:
                leaf.zero_()
            self._stats.append(stats)
            self._sums.fold(Node(stats.microbatch, stats.microbatch + 1), leaf, self._add)

    def finish(self, timer: PhaseTimer) -> Commit:
        """See ``Backend.finish``."""
        with timer.phase("push"):
            for node, flat in self._sums.pop_all():
                rows = tuple(row for row in self._stats if node.lo <= row.microbatch < node.hi)
                self._client.push(self.version, node, self._on_cpu(flat), rows, self._integers)
                self._sent.append(flat)
            self._stats.clear()
            self._integers = {}
        return self._wait(timer)

    def _wait(self, timer: PhaseTimer) -> Commit:
        with timer.phase("aggregate"):
            commit = self._client.wait(self.version + 1)
        # The servers know what they did while this worker waited; what is left was waiting for other workers.
        for stage in ("update", "commit"):
            timer.move(1e-3 * commit.server_ms.get(stage, 0.0), "aggregate", stage)
        self.version += 1
        return commit

    def _take_vector(self) -> Tensor:
        # Zeros once: keys overwrite their places at every use, and the padding between them must stay zero.
        return self._free.pop() if self._free else torch.zeros(self._replica.values.shape, device=self._replica.device)

    def _add(self, left: Tensor, right: Tensor) -> Tensor:
        left.add_(right)
        self._free.append(right)
        return left

    def _on_cpu(self, flat: Tensor) -> Tensor:
        return flat if flat.device.type == "cpu" else flat.cpu()

    def merge_metric(self, metric: Metric) -> Metric | None:
        """See ``Backend.merge_metric``: the coordinator merges."""
        return metric

    def mean_phases(self, phases_ms: dict[str, float]) -> dict[str, float]:
        """See ``Backend.mean_phases``: the coordinator averages."""
        return phases_ms

    def close(self) -> None:
        """See ``Backend.close``."""
        self._client.close()
