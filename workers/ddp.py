"""Backend of a torchrun rank: DistributedDataParallel sums the gradients, the shared optimizer updates every rank."""

import inspect
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.task import Metric
from paramserver.client import Client
from paramserver.errors import ReplicaMismatch
from paramserver.messages import Commit, MicrobatchStats
from paramserver.reduction import Node, TreeSum
from paramserver.state import State
from paramserver.transport.in_process import InProcessTransport
from workers.counted import Counted
from workers.local_servers import LocalServers
from workers.replica import Replica
from workers.timing import PHASES, PhaseTimer

__all__ = ["DdpBackend", "wrap_plainly"]


# Newer versions of torch have another name for it, and warn of the old one.
_SYNC = "forward_sync_buffers"
_SYNC = _SYNC if _SYNC in inspect.signature(DistributedDataParallel).parameters else "broadcast_buffers"
_NO_BUFFER_SYNC: dict[str, Any] = {_SYNC: False}


def wrap_plainly(module: nn.Module) -> nn.Module:
    """DistributedDataParallel as its users have it, tuned: gradients lie in its buckets, buffers are left alone."""
    return DistributedDataParallel(module, gradient_as_bucket_view=True, **_NO_BUFFER_SYNC)


class _HookState:
    """What the communication hook and the backend tell each other."""

    zero = False
    """Whether this rank has nothing to add."""
    last_bucket_at = 0.0
    """When backward handed the last bucket over."""


def _sum_bucket(state: _HookState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """A sum, where DDP's default is a mean: the division by the total weight comes once, on the whole sum."""
    buffer = bucket.buffer()
    if state.zero:
        buffer.zero_()
    state.last_bucket_at = time.perf_counter()
    work = dist.all_reduce(buffer, async_op=True)
    assert work is not None
    future: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return future


class DdpBackend:
    """One rank. Held to the numbers of the other backends (E7).

    Autograd adds a rank's microbatches one after the other and gloo or NCCL adds the ranks: that is the canonical tree
    for two ranks with at most two microbatches each, and differs from it in the last bits otherwise.

    Args:
        replica: this rank's model.
        servers: the rank's own copy of parameters and optimizer state.
        num_microbatches: ``M``.
        empty_loss: loss of any sample, for a rank that has none: its backward drives the all-reduce, as zeros.
        stop_requested: asked at each commit whether the run is to end there; one rank is enough.
        timeout_s: deadline of each wait.
    """

    def __init__(
        self,
        replica: Replica,
        servers: LocalServers,
        num_microbatches: int,
        empty_loss: Callable[[nn.Module], Tensor],
        stop_requested: Callable[[], bool],
        timeout_s: float,
    ) -> None:
        self._replica = replica
        self._servers = servers
        self._num_microbatches = num_microbatches
        self._empty_loss = empty_loss
        self._stop_requested = stop_requested
        self._client = Client(dist.get_rank(), replica.partition, InProcessTransport(servers.group), timeout_s)
        self.version = self._client.version
        gpu = [replica.device.index] if replica.device.type == "cuda" else None
        self.module: nn.Module = DistributedDataParallel(
            replica.model, device_ids=gpu, gradient_as_bucket_view=True, **_NO_BUFFER_SYNC
        )
        self._hook = _HookState()
        self.module.register_comm_hook(self._hook, _sum_bucket)
        self._synchronised = False
        self._stop = False
        self._root = torch.zeros(replica.partition.length, device=replica.device)
        self._buffer_sums = TreeSum[Tensor](num_microbatches)
        self._stats: list[MicrobatchStats] = []
        self._integers: Mapping[str, Tensor] = {}
        replica.load({}, self._client.constants)

    def pull(self, timer: PhaseTimer) -> None:
        """See ``Backend.pull``."""
        with timer.phase("pull"):
            self._servers.load(self._replica, self.version)

    @contextmanager
    def microbatch(self, index: int, *, last: bool) -> Iterator[None]:
        """See ``Backend.microbatch``: all but the last add up locally."""
        self._replica.reset_buffers()
        with nullcontext() if last else self.module.no_sync():  # type: ignore[operator]
            yield
        if self._replica.device.type == "cuda":  # its time is to be booked here, not on what reads its results
            torch.cuda.current_stream(self._replica.device).synchronize()
        self._synchronised |= last
        self._backward_done_at = time.perf_counter()

    def forwarded(self, counted: Counted) -> None:
        """See ``Backend.forwarded``: DDP needs nothing before backward."""

    def ahead(self) -> None:
        """See ``Backend.ahead``: every rank has everything at once."""

    def contribute(self, counted: Counted, timer: PhaseTimer) -> None:
        """See ``Backend.contribute``: gradients stay where DDP sums them, only buffers are taken."""
        stats = counted.read()
        with timer.phase("reduce"):
            leaf = self._replica.new_buffer_part()
            if stats.samples and self._replica.has_buffers:
                self._replica.take_buffer_changes(leaf, stats.samples)
            if stats.samples:
                self._integers = self._replica.agreed_integers(self._integers)
            self._stats.append(stats)
            self._buffer_sums.fold(Node(stats.microbatch, stats.microbatch + 1), leaf, torch.add)

    def push(self, timer: PhaseTimer) -> None:
        """See ``Backend.push``: when this returns, every rank has the sums."""
        if self._synchronised:
            # The end of backward waits for the last buckets: that is communication.
            timer.move(self._backward_done_at - self._hook.last_bucket_at, "compute", "push")
        else:
            with timer.phase("push"):
                self._join_with_zeros()
        with timer.phase("push"):
            stats, integers, self._stop = self._exchange()
            self._replica.take_gradients(self._root)
            node = Node(0, self._num_microbatches)
            self._client.push(self.version, node, self._root.cpu(), stats, integers)

    def wait(self, timer: PhaseTimer) -> Commit:
        """See ``Backend.wait``: nobody is waited for, this rank updates its own copy."""
        with timer.phase("update"):
            commit = self._client.wait(self.version + 1)
        timer.move(1e-3 * commit.server_ms["aggregate"], "update", "aggregate")
        self.version += 1
        self._synchronised = False
        self._stats.clear()
        self._integers = {}
        return commit._replace(stop=self._stop)

    def _join_with_zeros(self) -> None:
        self._hook.zero = True
        try:
            self._empty_loss(self.module).backward()  # type: ignore[no-untyped-call]
        finally:
            self._hook.zero = False

    def _exchange(self) -> tuple[tuple[MicrobatchStats, ...], dict[str, Tensor], bool]:
        """One small all-reduce: rows of all microbatches, buffer changes, integer buffers, and whether to stop."""
        M = self._num_microbatches
        rows = torch.zeros(M, 3, dtype=torch.float64)
        for row in self._stats:
            rows[row.microbatch] = torch.tensor(row[1:], dtype=torch.float64)
        changes = torch.zeros(0)
        if self._replica.has_buffers:
            # float64 sums of two fp32 numbers, rounded once, are the fp32 sums: 53 >= 2 x 24 + 2 bits.
            changes = self._join_nodes().cpu()
        models = self._replica.integer_buffers
        sizes = [value.numel() for value in models.values()]
        counted = [self._integers[name].reshape(-1) for name in models] if self._integers else []
        integers = torch.cat(counted).double() if counted else torch.zeros(sum(sizes), dtype=torch.float64)
        flags = torch.tensor([self._stop_requested(), bool(self._integers)], dtype=torch.float64)
        message = torch.cat([rows.reshape(-1), changes.double(), integers, flags])
        dist.all_reduce(message)
        rows_sum, changes_sum, integers_sum, flags = message.split(  # type: ignore[no-untyped-call]
            [3 * M, changes.numel(), sum(sizes), 2]
        )
        if self._replica.has_buffers:
            self._replica.buffer_part(self._root).copy_(changes_sum)
        agreed = integers_sum / flags[1]
        if self._integers and not torch.equal(agreed, integers):
            raise ReplicaMismatch(
                f"integer buffers differ between the ranks in step {self.version + 1}: {list(models)}"
            )
        values = {
            name: part.reshape(value.shape).to(value.dtype)
            for (name, value), part in zip(models.items(), agreed.split(sizes), strict=True)
        }
        stats = tuple(
            MicrobatchStats(index, float(loss), float(weight), int(samples))
            for index, (loss, weight, samples) in enumerate(rows_sum.view(M, 3).tolist())
        )
        return stats, values, bool(flags[0])

    def _join_nodes(self) -> Tensor:
        (_, total), *others = self._buffer_sums.pop_all()
        for _, other in others:
            total = total + other
        return total

    def note(self, step: int, stage: str) -> None:
        """See ``Backend.note``: nobody could look."""

    def merge_metric(self, metric: Metric) -> Metric | None:
        """See ``Backend.merge_metric``: rank 0 gets it."""
        parts: list[Metric | None] = [None] * dist.get_world_size()
        dist.gather_object(metric, parts if dist.get_rank() == 0 else None)
        if dist.get_rank() != 0:
            return None
        for other in parts[1:]:
            assert other is not None
            metric.merge(other)
        return metric

    def mean_phases(self, phases_ms: dict[str, float]) -> dict[str, float]:
        """See ``Backend.mean_phases``."""
        values = torch.tensor([phases_ms[name] for name in PHASES], dtype=torch.float64)
        dist.all_reduce(values)
        return dict(zip(PHASES, (values / dist.get_world_size()).tolist(), strict=True))

    def gather_pids(self) -> list[int]:
        """Process ids of all ranks."""
        pids: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(pids, os.getpid())
        return pids

    def state(self) -> State:
        """A copy of everything at the committed version."""
        return self._servers.state()

    def close(self) -> None:
        """See ``Backend.close``."""
        self._client.close()
        self._servers.close()
