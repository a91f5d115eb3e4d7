"""Backend of a parameter-server worker: read a version, send tree sums, wait for the commit."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from models.task import Metric
from paramserver.client import Client
from paramserver.messages import Commit, MicrobatchStats
from paramserver.partition import Slice
from paramserver.reduction import Node
from workers.gradient_sums import GradientSums
from workers.overlap import ReadySlices
from workers.replica import Replica
from workers.timing import PhaseTimer

__all__ = ["ParamServerBackend"]


class ParamServerBackend:
    """Adds microbatches of this worker's run along the canonical tree and pushes the maximal nodes.

    Args:
        replica: this worker's model.
        client: its way to the servers.
        run: this worker's microbatches.
        num_microbatches: ``M``.
        overlap: whether slices are pushed while backward goes on, where the way to the servers is made for it.
    """

    def __init__(
        self, replica: Replica, client: Client, run: range, num_microbatches: int, *, overlap: bool = False
    ) -> None:
        self.version = client.version
        self.module: nn.Module = replica.model
        self._replica = replica
        self._client = client
        on_cpu = replica.device.type == "cpu"
        allocate = client.allocate if on_cpu else lambda: torch.zeros_like(replica.values)
        self._ready: ReadySlices | None = None
        self._node: Node | None = None
        if overlap and on_cpu and client.shares_memory:
            keys = [key.name for key, _ in replica.parameters]
            self._ready = ReadySlices(replica.partition, keys, self._push_slices)
        self._sums = GradientSums(replica, run, num_microbatches, allocate, self._key_done)
        self._sent = self._sums.vectors if on_cpu else [_pinned(client.allocate()) for _ in self._sums.nodes]
        """What the servers read of each maximal node."""
        self._pushed: set[Node] = set()
        self._stats: list[MicrobatchStats] = []
        self._counted = False
        """Whether the row of the microbatch under way stands in ``_stats``."""
        self._integers: Mapping[str, Tensor] = {}
        replica.load({}, client.constants)

    def pull(self, timer: PhaseTimer) -> None:
        """See ``Backend.pull``."""
        with timer.phase("pull"):
            found = self._client.read(self.version) if self._replica.device.type == "cpu" else None
            if found is not None:
                self._replica.point_to(found[0])
                self._replica.load(found[1])
            else:
                self._replica.load(self._client.pull(self.version, self._replica.values))

    @contextmanager
    def microbatch(self, index: int, *, last: bool) -> Iterator[None]:
        """See ``Backend.microbatch``."""
        self._replica.reset_buffers()
        self._node = self._sums.begin(index).completes
        yield

    def forwarded(self, stats: MicrobatchStats) -> None:
        """See ``Backend.forwarded``: from here on backward may push what it makes whole."""
        self._sums.put_buffers(stats.samples)
        self._count(stats)
        if self._ready is not None and self._node is not None:
            self._ready.begin()

    def _count(self, stats: MicrobatchStats) -> None:
        if stats.samples:
            self._integers = self._replica.agreed_integers(self._integers)
        self._stats.append(stats)
        self._counted = True

    def _key_done(self, key: int) -> None:
        if self._ready is not None and self._ready.active:
            self._ready.done(key)

    def _push_slices(self, slices: Sequence[Slice]) -> None:
        assert self._node is not None
        self._push(self._node, slices)

    def _push(self, node: Node, slices: Sequence[Slice] | None = None) -> None:
        rows = tuple(row for row in self._stats if node.lo <= row.microbatch < node.hi)
        vector = self._sent[self._sums.nodes[node]]
        self._client.push(self.version, node, vector, rows, self._integers, slices)

    def contribute(self, stats: MicrobatchStats, timer: PhaseTimer) -> None:
        """See ``Backend.contribute``."""
        with timer.phase("reduce"):
            self._sums.end(stats.microbatch, stats.samples)
        if self._ready is not None and self._ready.active:
            with timer.phase("push"):
                self._ready.end()
                assert self._node is not None
                self._pushed.add(self._node)
        elif not self._counted:  # no sample, or a device that is not waited for before backward
            self._count(stats)
        self._counted = False

    def push(self, timer: PhaseTimer) -> None:
        """See ``Backend.push``."""
        with timer.phase("push"):
            if self._replica.device.type != "cpu":
                self._copy_to_host()
            for node in self._sums.nodes:
                if node not in self._pushed:
                    self._push(node)
            self._pushed.clear()
            self._stats.clear()
            self._integers = {}

    def _copy_to_host(self) -> None:
        for index in self._sums.nodes.values():
            self._sent[index].copy_(self._sums.vectors[index], non_blocking=True)
        torch.cuda.current_stream(self._replica.device).synchronize()

    def wait(self, timer: PhaseTimer) -> Commit:
        """See ``Backend.wait``."""
        with timer.phase("aggregate"):
            commit = self._client.wait(self.version + 1)
        # The servers know what they did while this worker waited; what is left was waiting for other workers.
        for stage in ("update", "commit"):
            timer.move(1e-3 * commit.server_ms.get(stage, 0.0), "aggregate", stage)
        self.version += 1
        return commit

    def merge_metric(self, metric: Metric) -> Metric | None:
        """See ``Backend.merge_metric``: the coordinator merges."""
        return metric

    def mean_phases(self, phases_ms: dict[str, float]) -> dict[str, float]:
        """See ``Backend.mean_phases``: the coordinator averages."""
        return phases_ms

    def close(self) -> None:
        """See ``Backend.close``."""
        self._client.close()


def _pinned(vector: Tensor) -> Tensor:
    """The vector, with its pages locked: only then a copy from a GPU does not wait."""
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    status = cudart.cudaHostRegister(vector.data_ptr(), vector.numel() * vector.element_size(), 0)
    torch.cuda.check_error(int(status))
    return vector
