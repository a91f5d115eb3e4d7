"""Backend of a parameter-server worker: read a version, send tree sums, wait for the commit."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn

from models.task import Metric
from paramserver.checksums import Checksums, verify
from paramserver.client import Client
from paramserver.integers import IntegerBlock
from paramserver.messages import Commit
from paramserver.partition import Slice
from paramserver.reduction import Node
from workers.counted import Counted
from workers.early_forward import EarlyForward
from workers.gradient_sums import GradientSums
from workers.host_memory import host_memory
from workers.launches import Launches
from workers.overlap import ReadySlices
from workers.replica import Replica, agree
from workers.timing import PhaseTimer, stage_word

__all__ = ["ParamServerBackend"]


class _OpenStep:
    """What this worker has counted in one step; whoever sends it may come to that when it counts the next one."""

    def __init__(self, version: int) -> None:
        self.version = version
        """The version that the step starts from."""
        self.rows: list[Counted] = []
        self.integers: list[IntegerBlock] = []
        """Integer buffers after each microbatch that has samples."""
        self.come: Callable[[], None] = lambda: None
        """Waits until both can be read."""

    def so_far(self) -> "_OpenStep":
        """A copy: what is counted later may not have come yet when this has."""
        copy = _OpenStep(self.version)
        copy.rows, copy.integers, copy.come = [*self.rows], [*self.integers], self.come
        return copy

    def agreed_integers(self) -> Mapping[str, Tensor]:
        """Those of the first microbatch, which the others must have, too; empty if there was none.

        Raises:
            ReplicaMismatch: naming the buffer that differs.
        """
        known: Mapping[str, Tensor] = {}
        for found in self.integers:
            known = agree(known, found)
        return known


class ParamServerBackend:
    """Adds microbatches of this worker's run along the canonical tree and pushes the maximal nodes.

    Args:
        replica: this worker's model.
        client: its way to the servers.
        run: this worker's microbatches.
        num_microbatches: ``M``.
        overlap: whether slices are pushed while backward goes on, where the way to the servers is made for it.
        early_forward: whether a forward pass may begin before its version is committed, likewise; never with a vote. A
            CPU begins with the parameters that are there, a GPU has the pass in its queue when the last of them comes.
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
        self._memory = host_memory(replica, client, queues=early_forward and client.shares_memory)
        self._ready: ReadySlices | None = None
        self._node: Node | None = None
        if overlap and client.shares_memory:
            keys = [key.name for key, _ in replica.parameters]
            self._ready = ReadySlices(replica.partition, keys, self._slices_whole, copies=self._memory.copies)
        self._launches = Launches()
        self._early: EarlyForward | None = None
        if early_forward and client.shares_memory and not self._memory.copies:
            self._early = EarlyForward(replica, lambda slices: self._memory.bring(self._shown, slices))
        try:
            self._sums = GradientSums(replica, run, num_microbatches, self._memory.new_sum, self._key_done)
        except BaseException:  # a server may be gone by now; a later backend locks the same pages
            self._memory.close()
            raise
        self._pushed: set[Node] = set()
        # A GPU's gradients arrive later than backward hands them out, and nobody else would wait for them meanwhile.
        self._sender: ThreadPoolExecutor | None = None
        if client.shares_memory and self._memory.copies:
            self._sender = ThreadPoolExecutor(1, initializer=self._memory.begin_thread)
        self._sending: list[Future[None]] = []
        self._groups: list[Sequence[Slice]] = []
        """Slices in the order in which the last node was sent."""
        self._prepared: dict[Node, Callable[[], None]] = {}
        """What pushes nodes that are whole after the backward under way: that much less is to be done behind it."""
        self._computed: Callable[[], None] = self._memory.computed()
        self._step = _OpenStep(self.version)
        self._next: Tensor | None = None
        """Where the next version will stand, if parameters are to point there as soon as backward is done with them."""
        self._counted = False
        """Whether the row of the microbatch under way stands in the step."""
        self._knows_integers = False
        """Whether the replica has the next version's integer buffers: all microbatches agree on them."""
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
            if not self._ahead:
                self._replica.load(self._memory.pull(self.version))
            elif self._early is not None:
                self._early.bring_rest()
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
        if self._memory.queues and not self._ahead:
            self._launches.begin()
        self._ahead = False
        self._node = self._sums.begin(index).completes
        self._next = self._client.vector(self.version + 1) if last and not self._memory.copies else None
        with self._early.watched() if learns and self._early else nullcontext():
            try:
                yield
            finally:
                self._launches.end()  # of a pass that was interrupted, else ``forwarded`` has said so

    def ahead(self) -> AbstractContextManager[None] | None:
        """See ``Backend.ahead``."""
        can = self._launches.fit if self._memory.queues else self._early is not None and self._early.learned
        return self._forward_ahead() if can and self._knows_integers else None

    @contextmanager
    def _forward_ahead(self) -> Iterator[None]:
        self._shown = self.version + 1
        self._memory.show(self._shown)
        with self._early.early() if self._early is not None else nullcontext():
            self._replica.keep_integers()
            self._replica.reset_buffers()
            yield
        self._ahead = True

    def forwarded(self, counted: Counted) -> None:
        """See ``Backend.forwarded``: from here on backward may push what it makes whole, with the node's rows."""
        self._launches.end()
        self._sums.put_buffers(counted.samples)
        self._count(counted)
        if self._node is None:
            return
        if self._ready is not None:
            self._groups = []
            self._ready.begin()
        elif not self._memory.copies:
            self._prepared[self._node] = self._message(self._node)

    def _count(self, counted: Counted) -> None:
        if counted.samples:
            self._step.integers.append(self._replica.integers(later=self._memory.copies))
        self._step.rows.append(counted)
        self._step.come = self._memory.computed()
        self._counted = True

    def _key_done(self, key: int) -> None:
        if self._next is not None:
            self._replica.point_ahead(key, self._next)
        if self._ready is not None and self._ready.active:
            self._ready.done(key)

    def _slices_whole(self, slices: Sequence[Slice]) -> None:
        assert self._node is not None
        self._sums.settle()
        if slices:
            self._groups.append(slices)
        self._send(self._node, slices)

    def _send(self, node: Node, slices: Sequence[Slice]) -> None:
        """Push slices of a node, now or as soon as the device has made them."""
        arrive = self._memory.send(self._vector(node), slices)
        if self._sender is None:
            arrive()
            self._message(node, slices)()
        else:
            self._sending.append(self._sender.submit(self._send_later, arrive, self._step.so_far(), node, slices))

    def _send_later(self, arrive: Callable[[], None], step: _OpenStep, node: Node, slices: Sequence[Slice]) -> None:
        try:
            step.come()
            push = self._message(node, slices, step)  # made before it can be sent: that much less is to be done then
            arrive()
            push()
        except BaseException:
            self._memory.release()  # the device would wait for what will never come, and the host for the device
            raise

    def _vector(self, node: Node) -> Tensor:
        return self._sums.vectors[self._sums.nodes[node]]

    def _message(
        self, node: Node, slices: Sequence[Slice] | None = None, step: _OpenStep | None = None
    ) -> Callable[[], None]:
        """What pushes a node's slices, once they are on the host."""
        step = step or self._step
        rows = tuple(row.read() for row in step.rows if node.lo <= row.microbatch < node.hi)
        vector = self._memory.on_host(self._vector(node))
        return self._client.prepare(step.version, node, vector, rows, step.agreed_integers(), slices)

    def contribute(self, counted: Counted, timer: PhaseTimer) -> None:
        """See ``Backend.contribute``."""
        with timer.phase("reduce"):
            self._sums.end(counted.microbatch, counted.samples)
        if not self._counted:  # it has no sample
            self._count(counted)
        if self._ready is not None and self._ready.active:
            assert self._node is not None
            with timer.phase("push"):
                self._ready.end()
                self._pushed.add(self._node)
        self._counted = False

    def push(self, timer: PhaseTimer) -> None:
        """See ``Backend.push``."""
        computed = self._memory.computed()
        if self._sender is None and self._memory.copies:
            with timer.phase("compute"):
                computed()
        with timer.phase("push"):
            for node in self._sums.nodes:
                if node not in self._pushed:
                    if (prepared := self._prepared.pop(node, None)) is not None:
                        prepared()
                    else:
                        self._send(node, self._replica.partition.slices)
            self._computed = computed
            self._memory.expect(self.version + 1, self._groups or [self._replica.partition.slices])
            self._pushed.clear()
            self._groups = []
            self._knows_integers = bool(self._step.integers) or not self._replica.integer_buffers
            self._step = _OpenStep(self.version + 1)

    def wait(self, timer: PhaseTimer) -> Commit:
        """See ``Backend.wait``."""
        if self._early is not None:
            timer.move(self._early.waited_s, "compute", "pull")
            self._early.waited_s = 0.0
        if self._sending:
            with timer.phase("compute"):
                self._computed()
            with timer.phase("push"):
                for sent in self._sending:
                    sent.result()
                self._sending.clear()
        with timer.phase("aggregate"):
            self._memory.settle()
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
        self._memory.release()
        self._client.close()  # nobody waits for a server any more
        if self._sender is not None:
            self._sender.shutdown(cancel_futures=True)
        self._sums.close()
        if self._early is not None:
            self._early.close()
        self._memory.close()
        self._replica.let_go()
