"""Backend of a parameter-server worker: read a version, send tree sums, wait for the commit."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn

from models.task import Metric
from paramserver.checksums import Checksums, verify
from paramserver.client import Client
from paramserver.messages import Commit, MicrobatchStats
from paramserver.partition import Slice
from paramserver.reduction import Node
from workers.early_forward import EarlyForward
from workers.gradient_sums import GradientSums
from workers.host_memory import host_memory
from workers.overlap import ReadySlices
from workers.replica import Replica
from workers.timing import PhaseTimer, stage_word

__all__ = ["ParamServerBackend"]


class ParamServerBackend:
    """Adds microbatches of this worker's run along the canonical tree and pushes the maximal nodes.

    Args:
        replica: this worker's model.
        client: its way to the servers.
        run: this worker's microbatches.
        num_microbatches: ``M``.
        overlap: whether slices are pushed while backward goes on, where the way to the servers is made for it.
        early_forward: whether a forward pass may begin with parameters that are there, likewise; never with a vote.
    """

    def __init__(
        self,
        replica: Replica,
        client: Client,
        run: range,
        num_microbatches: int,
        *,
        overlap: bool = False,
        early_forward: bool = False,
    ) -> None:
        self.version = client.version
        self.module: nn.Module = replica.model
        self._replica = replica
        self._client = client
        self._memory = host_memory(replica, client)
        self._ready: ReadySlices | None = None
        self._node: Node | None = None
        if overlap and client.shares_memory:
            keys = [key.name for key, _ in replica.parameters]
            self._ready = ReadySlices(replica.partition, keys, self._slices_whole)
        self._early: EarlyForward | None = None
        if early_forward and client.shares_memory:
            self._early = EarlyForward(replica, lambda slices: self._memory.bring(self._shown, slices))
        self._sums = GradientSums(replica, run, num_microbatches, self._memory.new_sum, self._key_done)
        self._pushed: set[Node] = set()
        # A GPU's gradients arrive later than backward hands them out, and nobody else would wait for them meanwhile.
        self._sender: ThreadPoolExecutor | None = None
        if self._ready is not None and self._memory.copies:
            self._sender = ThreadPoolExecutor(1, initializer=self._memory.begin_thread)
        self._sending: list[Future[None]] = []
        self._prepared: dict[Node, Callable[[], None]] = {}
        """What pushes nodes that are whole after the backward under way: that much less is to be done behind it."""
        self._stats: list[MicrobatchStats] = []
        self._next: Tensor | None = None
        """Where the next version will stand, if parameters are to point there as soon as backward is done with them."""
        self._counted = False
        """Whether the row of the microbatch under way stands in ``_stats``."""
        self._integers: Mapping[str, Tensor] = {}
        self._next_integers: Mapping[str, Tensor] = {}
        """Integer buffers of the next version, if this worker has had a sample: all microbatches agree on them."""
        self._shown = self.version
        """The version that the replica takes up slice by slice."""
        self._checksums: Checksums = ()
        """Of the version that is pulled next, if it is to be compared."""
        self._ahead = False
        """Whether the forward pass of the next microbatch was begun early."""
        replica.load({}, client.constants)

    def pull(self, timer: PhaseTimer) -> None:
        """See ``Backend.pull``."""
        with timer.phase("pull"):
            if self._ahead and self._early is not None:
                self._early.bring_rest()
            else:
                self._replica.load(self._memory.pull(self.version))
            if self._checksums:
                who = f"worker {self._client.worker}"
                verify(self._replica.partition, self._replica.values.cpu(), self._checksums, self.version, who)
                self._checksums = ()

    @contextmanager
    def microbatch(self, index: int, *, last: bool) -> Iterator[None]:
        """See ``Backend.microbatch``."""
        if not self._ahead:
            self._replica.reset_buffers()
        learns = self._early is not None and not self._early.learned and not self._ahead
        self._ahead = False
        self._node = self._sums.begin(index).completes
        self._next = self._client.vector(self.version + 1) if last and not self._memory.copies else None
        with self._early.watched() if learns and self._early else nullcontext():
            yield

    def ahead(self) -> AbstractContextManager[None] | None:
        """See ``Backend.ahead``."""
        knows_integers = bool(self._next_integers) or not self._replica.integer_buffers
        may = self._early is not None and self._early.learned and knows_integers
        return self._forward_ahead() if may else None

    @contextmanager
    def _forward_ahead(self) -> Iterator[None]:
        assert self._early is not None
        self._shown = self.version + 1
        self._memory.show(self._shown)
        with self._early.early():
            self._replica.load(self._next_integers)
            self._replica.reset_buffers()
            yield
        self._ahead = True

    def forwarded(self, samples: int, stats: Callable[[], MicrobatchStats]) -> None:
        """See ``Backend.forwarded``: from here on backward may push what it makes whole, with the node's rows."""
        self._sums.put_buffers(samples)
        ready = None if self._node is None else self._ready
        if ready is not None or not self._memory.copies:
            self._count(stats())
        if ready is not None:
            ready.begin()
        elif self._node is not None and not self._memory.copies:
            self._prepared[self._node] = self._message(self._node)

    def _count(self, stats: MicrobatchStats) -> None:
        if stats.samples:
            self._integers = self._replica.agreed_integers(self._integers)
        self._stats.append(stats)
        self._counted = True

    def _key_done(self, key: int) -> None:
        if self._next is not None:
            self._replica.point_ahead(key, self._next)
        if self._ready is not None and self._ready.active:
            self._ready.done(key)

    def _slices_whole(self, slices: Sequence[Slice]) -> None:
        assert self._node is not None
        arrive = self._memory.send(self._vector(self._node), slices)
        if self._sender is None:
            arrive()
            self._message(self._node, slices)()
        else:
            self._sending.append(self._sender.submit(_in_turn, arrive, self._message(self._node, slices)))

    def _vector(self, node: Node) -> Tensor:
        return self._sums.vectors[self._sums.nodes[node]]

    def _message(self, node: Node, slices: Sequence[Slice] | None = None) -> Callable[[], None]:
        """What pushes a node's slices, once they are on the host."""
        rows = tuple(row for row in self._stats if node.lo <= row.microbatch < node.hi)
        vector = self._memory.on_host(self._vector(node))
        return self._client.prepare(self.version, node, vector, rows, self._integers, slices)

    def contribute(self, stats: MicrobatchStats, timer: PhaseTimer) -> None:
        """See ``Backend.contribute``."""
        with timer.phase("reduce"):
            self._sums.end(stats.microbatch, stats.samples)
        if not self._counted:  # no sample, or a device that is not waited for before backward
            self._count(stats)
        if self._ready is not None and self._ready.active:
            assert self._node is not None
            with timer.phase("push"):
                self._ready.end()
                for sent in self._sending:
                    sent.result()
                self._sending.clear()
                self._pushed.add(self._node)
        self._counted = False

    def push(self, timer: PhaseTimer) -> None:
        """See ``Backend.push``."""
        with timer.phase("push"):
            left = [node for node in self._sums.nodes if node not in self._pushed]
            arrivals = [self._memory.send(self._vector(node), self._replica.partition.slices) for node in left]
            for node, arrive in zip(left, arrivals, strict=True):
                arrive()
                (self._prepared.pop(node, None) or self._message(node))()
            self._memory.expect(self.version + 1)
            self._pushed.clear()
            self._stats.clear()
            self._next_integers, self._integers = self._integers, {}

    def wait(self, timer: PhaseTimer) -> Commit:
        """See ``Backend.wait``."""
        if self._early is not None:
            timer.move(self._early.waited_s, "compute", "pull")
            self._early.waited_s = 0.0
        with timer.phase("aggregate"):
            commit = self._client.wait(self.version + 1)
        # The servers know what they did while this worker waited; what is left was waiting for other workers.
        for stage in ("update", "commit"):
            timer.move(1e-3 * commit.server_ms.get(stage, 0.0), "aggregate", stage)
        self.version += 1
        self._checksums = commit.checksums
        return commit

    def note(self, step: int, stage: str) -> None:
        """See ``Backend.note``."""
        self._client.note(stage_word(step, stage))

    def merge_metric(self, metric: Metric) -> Metric | None:
        """See ``Backend.merge_metric``: the coordinator merges."""
        return metric

    def mean_phases(self, phases_ms: dict[str, float]) -> dict[str, float]:
        """See ``Backend.mean_phases``: the coordinator averages."""
        return phases_ms

    def close(self) -> None:
        """See ``Backend.close``: another backend may be built for the replica then."""
        if self._sender is not None:
            self._sender.shutdown(cancel_futures=True)
        self._sums.close()
        if self._early is not None:
            self._early.close()
        self._memory.close()
        self._replica.let_go()
        self._client.close()


def _in_turn(first: Callable[[], None], then: Callable[[], None]) -> None:
    first()
    then()
