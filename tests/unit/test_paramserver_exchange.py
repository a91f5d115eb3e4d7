"""A step that is taken without the interpreter ends as one that is not: the same bits, commits, records and errors."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from paramserver import fused
from paramserver.client import Client
from paramserver.config import OptimizerConfig
from paramserver.errors import (
    NonFiniteGradient,
    PartitionMismatch,
    PushRefused,
    ReplicaMismatch,
    ServerLost,
    StaleContribution,
    StepTimeout,
)
from paramserver.fused_sgd import fused_sgd
from paramserver.messages import Commit, FlatSlices, MicrobatchStats, Push
from paramserver.partition import Slice
from paramserver.reduction import Node, maximal_nodes
from paramserver.server import Server
from paramserver.server_memory import ServerMemory
from paramserver.transport import exchange
from paramserver.transport.hub import Hub
from paramserver.transport.shared_memory import SharedMemoryTransport
from paramserver.transport.versions import VersionsArena
from tests.support.servers import TIMEOUT_S, Fleet, bits_equal, rows_of

needs_a_compiler = pytest.mark.skipif(fused_sgd() is None, reason="no C compiler")

M = 4
LEAVES = [Node(index, index + 1) for index in range(M)]
SGD = OptimizerConfig(lr=0.1, momentum=0.9, weight_decay=0.01)
TAUGHT = 2
"""Steps before the first that may be foretold: one to see who pushes what, one more for the momentum's first halves."""


Order = Callable[[int, int], Iterable[int]]


class Run:
    """Workers and a hub in this process, on memory of their own."""

    def __init__(
        self,
        optimizer: OptimizerConfig = SGD,
        nodes: list[Node] = LEAVES,
        *,
        foretell: bool = True,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        values = {
            "conv": torch.randn(40, 33, generator=generator),
            "bias": torch.randn(7, generator=generator),
            "bn.mean": torch.randn(5, generator=generator),
        }
        self.fleet = Fleet(
            values,
            optimizer,
            num_microbatches=M,
            slice_bytes=1024,
            buffers=["bn.mean"],
            integers={"seen": torch.tensor(0), "flags": torch.tensor([True, False])},
        )
        self.versions = VersionsArena.create(self.fleet.partition)
        about = (self.fleet.partition, 0, optimizer, M, self.fleet.initial)
        self.memory = ServerMemory(*about, self.versions.vectors)
        self.server = Server(0, self.fleet.partition, optimizer, M, self.fleet.initial, memory=self.memory)
        self.commits: list[Commit | None] = []
        self.hub = Hub(self.server, self.versions, threads=2, on_change=self.commits.append, foretell=foretell)
        self._foretold = 0
        if self.hub._usual is not None:
            self._count(self.hub._usual)
        self.nodes = nodes
        self.clients = [self.join(worker, timeout_s) for worker in range(len(nodes))]
        self.vectors = [client.allocate() for client in self.clients]

    def _count(self, usual: Any) -> None:
        take = usual.run

        def counted() -> bool:
            done: bool = take()
            self._foretold += done
            return done

        usual.run = counted

    @property
    def foretold(self) -> int:
        """Steps that were taken whole; asked in the hub's thread, which counts after everybody was told."""
        return self.hub.call(lambda: self._foretold).result(TIMEOUT_S)

    def join(self, worker: int, timeout_s: float = TIMEOUT_S) -> Client:
        transport = SharedMemoryTransport({0: self.hub.address}, self.fleet.partition)
        return Client(worker, self.fleet.partition, transport, timeout_s)

    def fill(self, step: int) -> None:
        for worker, vector in enumerate(self.vectors):
            generator = torch.Generator().manual_seed(100 * step + worker)
            vector.copy_(torch.randn(vector.shape, generator=generator))

    def push(
        self,
        step: int,
        worker: int,
        *,
        integers: dict[str, Tensor] | None = None,
        only: list[Slice] | None = None,
        **row: Any,
    ) -> None:
        node = self.nodes[worker]
        about = {"weight": 3.0 + worker, "samples": 2 + worker, "loss": 0.1 * step + worker, **row}
        seen = {"seen": torch.tensor(step + 1), "flags": torch.tensor([False, True])}
        self.clients[worker].push(step, node, self.vectors[worker], rows_of(node, **about), integers or seen, only)

    def step(self, step: int, **row: Any) -> list[Commit]:
        self.fill(step)
        for worker in range(len(self.nodes)):
            self.push(step, worker, **row)
        return [client.wait(step + 1) for client in self.clients]

    def buckets(self, count: int) -> list[list[Slice]]:
        """All slices in so many parts."""
        return [list(self.fleet.partition.slices[index::count]) for index in range(count)]

    def step_in_buckets(self, step: int, buckets: list[list[Slice]], order: Order) -> list[Commit]:
        """As ``step``; ``order`` gives who pushes next, each its first bucket first."""
        self.fill(step)
        sent = [0] * len(self.nodes)
        for worker in order(len(self.nodes), len(buckets)):
            self.push(step, worker, only=buckets[sent[worker]])
            sent[worker] += 1
        return [client.wait(step + 1) for client in self.clients]

    def state(self) -> dict[str, Tensor]:
        snapshot = self.hub.call(lambda: self.server.snapshot(self.server.version)).result(TIMEOUT_S)
        found = {f"{index}": part.values for index, part in snapshot.slices.items()}
        for index, part in snapshot.slices.items():
            found |= {f"{index}/{name}": value.reshape(-1) for name, value in part.optimizer.items()}
        return found | {name: value.reshape(-1).float() for name, value in snapshot.integers.items()}

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.hub.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Run]]:
    """Makes runs, and closes them."""
    runs: list[Run] = []

    def new(*args: Any, **settings: Any) -> Run:
        runs.append(Run(*args, **settings))
        return runs[-1]

    yield new
    for run in runs:
        run.close()


Start = Callable[..., Run]


def _known(commit: Commit) -> Commit:
    """Without times, which are measured."""
    return commit._replace(server_ms={})


def _assert_as_undisturbed(run: Run, start: Start, steps: int, optimizer: OptimizerConfig = SGD) -> None:
    plain = start(optimizer, run.nodes, foretell=False)
    for step in range(steps):
        plain.step(step)
    assert bits_equal(run.state(), plain.state())


OPTIMIZERS = {
    "plain": OptimizerConfig(lr=0.1),
    "momentum": OptimizerConfig(lr=0.1, momentum=0.9),
    "nesterov": OptimizerConfig(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": OptimizerConfig(name="adam", lr=0.01),
    "adamw": OptimizerConfig(name="adamw", lr=0.01, weight_decay=0.1, schedule="cosine", total_steps=8),
    "schedule": OptimizerConfig(lr=0.5, momentum=0.9, schedule="step", total_steps=8, decay_factor=0.5),
}


@needs_a_compiler
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("cuts", [(1, 2, 3, 4), (2, 4), (4,)], ids=str)
def test_steps_that_are_foretold_have_the_bits_of_those_that_are_not(
    start: Start, optimizer: OptimizerConfig, cuts: tuple[int, ...]
) -> None:
    edges = [0, *cuts]
    nodes = [node for lo, hi in zip(edges, cuts, strict=False) for node in maximal_nodes(lo, hi, M)]
    quick, plain = start(optimizer, nodes), start(optimizer, nodes, foretell=False)
    steps = 8
    for step in range(steps):
        told, wanted = quick.step(step), plain.step(step)
        assert [_known(commit) for commit in told] == [
            _known(commit)._replace(last_worker=told[0].last_worker) for commit in wanted
        ]
        assert bits_equal(quick.state(), plain.state())
        read = quick.clients[-1].read(step + 1)
        assert read is not None
        assert read[1]["seen"] == step + 1
        assert read[1]["flags"].tolist() == [False, True]
    assert quick.foretold >= steps - TAUGHT
    assert plain.foretold == 0
    assert [commit.version for commit in quick.commits if commit is not None] == list(range(1, steps + 1))


@needs_a_compiler
def test_what_is_kept_of_a_foretold_step_is_enough_to_go_on_from(start: Start) -> None:
    run = start()
    for step in range(5):
        (told, *_) = run.step(step)
    assert run.foretold
    kept = run.memory.record(5)
    assert kept is not None
    assert kept[0] == told
    assert kept[1]["seen"] == 5
    follower = Server(0, run.fleet.partition, SGD, M, run.fleet.initial, memory=run.memory)
    assert (follower.version, follower.last) == (5, told)
    assert run.versions.committed(0) == 5
    assert all(run.versions.has(piece, 5) for piece in run.fleet.partition.slices)


@needs_a_compiler
def test_a_commit_says_who_came_last_and_whether_the_run_ends(start: Start) -> None:
    run = start()
    for step in range(4):
        run.step(step)
    run.fill(4)
    for worker in (3, 1, 0):
        run.push(4, worker)
    run.hub.stop = run.hub.leave = True
    run.push(4, 2)
    commit = run.clients[0].wait(5)
    assert (commit.last_worker, commit.stop, commit.leave) == (2, True, True)
    assert run.foretold == 5 - TAUGHT


def _weigh_in_parts(run: Run, step: int) -> None:
    run.fill(step)
    for worker in range(M):
        run.push(step, worker, weight=0.1 + 0.3 * worker)


def _push_slices(run: Run, step: int) -> None:
    run.fill(step)
    for worker, node in enumerate(run.nodes):
        for piece in run.fleet.partition.slices:
            about = (run.vectors[worker], rows_of(node), {"seen": torch.tensor(step + 1)}, [piece])
            run.clients[worker].push(step, node, *about)


def _repeat(run: Run, step: int) -> None:
    run.fill(step)
    for worker in (0, 0, 1, 2, 1, 3):
        run.push(step, worker)


def _others_come_in(run: Run, step: int) -> None:
    run.fill(step)
    run.push(step, 0)
    run.clients.append(run.join(M))
    for worker in range(1, M):
        run.push(step, worker)


def _one_goes(run: Run, step: int) -> None:
    run.fill(step)
    for worker in range(M - 1):
        run.push(step, worker)
    run.clients[-1].close()
    run.clients[-1] = run.join(M - 1)
    run.clients[-1].push(step, run.nodes[-1], run.vectors[-1], rows_of(run.nodes[-1], weight=6.0, samples=5), {})


STRANGE = {
    "weights that are no whole numbers": _weigh_in_parts,
    "slice by slice": _push_slices,
    "some of it twice": _repeat,
    "somebody joins": _others_come_in,
    "somebody goes and comes again": _one_goes,
}


@needs_a_compiler
@pytest.mark.parametrize("happens", STRANGE.values(), ids=STRANGE.keys())
def test_a_strange_step_between_usual_ones_is_exact(start: Start, happens: Callable[[Run, int], None]) -> None:
    quick, plain = start(), start(foretell=False)
    for run in (quick, plain):
        for step in range(8):
            if step == 4:
                happens(run, step)
                for client in run.clients:
                    client.wait(step + 1)
            else:
                run.step(step)
    assert bits_equal(quick.state(), plain.state())
    assert quick.foretold >= 3


@needs_a_compiler
def test_a_bad_push_to_a_foretold_step_is_refused_by_name_and_the_step_stays_exact(start: Start) -> None:
    run = start()
    for step in range(4):
        run.step(step)
    run.fill(4)
    run.push(4, 0)
    node, vector = run.nodes[1], run.vectors[1]
    refused: list[tuple[type[PushRefused], str, Callable[[], None]]] = [
        (StaleContribution, "has committed version 4 already", lambda: run.push(2, 1)),
        (PushRefused, "not open yet", lambda: run.push(5, 1)),
        (PartitionMismatch, "rows", lambda: run.clients[1].push(4, node, vector, rows_of(Node(2, 3)), {})),
        (
            ReplicaMismatch,
            "'seen' differs",
            lambda: run.push(4, 1, integers={"seen": torch.tensor(99), "flags": torch.tensor([False, True])}),
        ),
    ]
    for error, message, push in refused:
        push()
        with pytest.raises(error, match=message):
            run.clients[1].wait(5)
    for worker in range(1, M):
        run.push(4, worker)
    assert [client.wait(5).version for client in run.clients] == [5] * M
    run.step(5)
    _assert_as_undisturbed(run, start, 6)
    assert run.foretold == 6 - TAUGHT - 1


@needs_a_compiler
def test_integer_buffers_that_disagree_in_a_foretold_step_are_named(start: Start) -> None:
    run = start()
    for step in range(4):
        run.step(step)
    run.fill(4)
    for worker in range(M):
        run.push(4, worker, integers={"seen": torch.tensor(5 + (worker == 2)), "flags": torch.tensor([False, True])})
    with pytest.raises(ReplicaMismatch, match="'seen' differs"):
        run.clients[2].wait(5)
    run.push(4, 2)
    assert run.clients[0].wait(5).version == 5


@needs_a_compiler
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_named_in_a_foretold_step(start: Start, value: float) -> None:
    run = start()
    for step in range(4):
        run.step(step)
    before = run.state()
    run.fill(4)
    key = next(key for key in run.fleet.partition.keys if key.name == "bias")
    key.view(run.vectors[1])[3] = value
    for worker in range(M):
        run.push(4, worker)
    for client in run.clients:
        with pytest.raises(NonFiniteGradient, match="'bias' is not finite in step 5"):
            client.wait(5)
    assert run.memory.version == 4
    assert bits_equal(run.state(), before)


@needs_a_compiler
def test_a_wait_past_its_deadline_names_who_is_missing_in_a_foretold_step(start: Start) -> None:
    run = start()
    for step in range(4):
        run.step(step)
    run.fill(4)
    run.push(4, 0)
    run.push(4, 2)
    impatient = run.join(0, timeout_s=0.0)
    with pytest.raises(StepTimeout, match=r"waits for microbatches \[1, 3\]"):
        impatient.wait(5)
    impatient.close()
    run.push(4, 1)
    run.push(4, 3)
    assert run.clients[0].wait(5).version == 5
    run.step(5)
    _assert_as_undisturbed(run, start, 6)


@needs_a_compiler
def test_a_held_version_is_not_overwritten_by_a_foretold_step(start: Start) -> None:
    run = start()
    for step in range(4):
        run.step(step)
    run.hub.call(lambda: run.server.hold(3)).result(TIMEOUT_S)
    wanted = [value.clone() for value in run.hub.call(lambda: run.server.values(3)).result(TIMEOUT_S)]
    run.fill(4)
    for worker in range(M):
        run.push(4, worker)
    held = run.hub.call(lambda: run.server.values(3)).result(TIMEOUT_S)
    assert all(map(torch.equal, held, wanted))
    run.hub.call(lambda: run.server.release(3)).result(TIMEOUT_S)
    assert run.clients[0].wait(5).version == 5


@needs_a_compiler
def test_members_come_again_after_foretold_steps(start: Start) -> None:
    run = start()
    for step in range(4):
        run.step(step)
    run.fill(4)
    run.push(4, 0)
    run.hub.call(lambda: run.hub.regroup(1)).result(TIMEOUT_S)
    with pytest.raises(ServerLost):
        run.clients[0].wait(5)
    for client in run.clients:
        client.close()
    run.clients = [run.join(worker) for worker in range(M)]
    run.vectors = [client.allocate() for client in run.clients]
    for step in range(4, 9):
        run.step(step)
    _assert_as_undisturbed(run, start, 9)
    assert run.foretold > 4 - TAUGHT


def test_without_a_compiler_each_step_goes_through_the_interpreter(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = start(foretell=False)
    exchange._library.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(fused.shutil, "which", lambda _: None)
        run = start()
    for step in range(5):
        for each in (run, plain):
            each.step(step)
    assert run.foretold == 0
    assert bits_equal(run.state(), plain.state())


def test_a_row_holds_what_a_worker_counts(start: Start) -> None:
    run = start()
    for step in range(4):
        commits = run.step(step, loss=math.inf)
    assert commits[0].stats[3] == MicrobatchStats(3, math.inf, 6.0, 5)


# -- in buckets --------------------------------------------------------------------------------------------------------

ORDERS: dict[str, Order] = {
    "bucket by bucket": lambda workers, buckets: [worker for _ in range(buckets) for worker in range(workers)],
    "worker by worker": lambda workers, buckets: [worker for worker in range(workers) for _ in range(buckets)],
    "backwards": lambda workers, buckets: [worker for worker in reversed(range(workers)) for _ in range(buckets)],
}


@needs_a_compiler
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_step_in_buckets_is_foretold_and_has_the_bits_of_one_that_is_not(
    start: Start, count: int, order: Order
) -> None:
    quick, plain = start(), start(foretell=False)
    steps = 8
    for step in range(steps):
        told = quick.step_in_buckets(step, quick.buckets(count), order)
        wanted = plain.step(step)
        assert [_known(commit)._replace(last_worker=None) for commit in told] == [
            _known(commit)._replace(last_worker=None) for commit in wanted
        ]
        assert bits_equal(quick.state(), plain.state())
    assert quick.foretold >= steps - TAUGHT
    assert [commit.version for commit in quick.commits if commit is not None] == list(range(1, steps + 1))


@needs_a_compiler
@pytest.mark.parametrize("foretell", [True, False])
def test_who_waits_for_slices_has_each_bucket_before_the_next_is_pushed(start: Start, foretell: bool) -> None:
    run = start(foretell=foretell)
    buckets = run.buckets(3)
    for step in range(8):
        run.fill(step)
        for index, bucket in enumerate(buckets):
            for worker in range(len(run.nodes)):
                run.push(step, worker, only=bucket)
            if index < len(buckets) - 1:
                for client in run.clients:
                    client.await_slices(step + 1, bucket)
                assert run.versions.committed(0) == step
                assert not any(run.versions.has(piece, step + 1) for later in buckets[index + 1 :] for piece in later)
        for client in run.clients:
            client.await_slices(step + 1, run.fleet.partition.slices)
            assert client.wait(step + 1).version == step + 1
    assert run.foretold == (8 - TAUGHT if foretell else 0)
    _assert_as_undisturbed(run, start, 8)


def _elsewhere(run: Run) -> None:
    run.hub.call(lambda: None).result(TIMEOUT_S)


def _twice(run: Run) -> None:
    run.push(4, 0, only=run.buckets(4)[0])


def _nothing(run: Run) -> None:
    client, node = run.clients[2], run.nodes[2]
    seen = {"seen": torch.tensor(5), "flags": torch.tensor([False, True])}
    rows = rows_of(node, weight=5.0, samples=4, loss=2.4)
    # A client sends nothing then.
    client._transport.push(0, Push("run", 4, 0, 2, node, FlatSlices(run.vectors[2], []), rows, seen))


def _whole(run: Run) -> None:
    run.push(4, 1)


def _member(run: Run) -> None:
    run.clients.append(run.join(M))


def _gone(run: Run) -> None:
    run.clients[-1].close()
    run.clients[-1] = run.join(M - 1)
    run.vectors[-1] = run.clients[-1].allocate()
    for bucket in run.buckets(4):
        run.fill(4)
        run.push(4, M - 1, only=bucket)


MIDWAY = {
    "a call": _elsewhere,
    "a bucket twice": _twice,
    "a push of nothing": _nothing,
    "all at once": _whole,
    "somebody joins": _member,
    "somebody goes and comes again": _gone,
}


@needs_a_compiler
@pytest.mark.parametrize("happens", MIDWAY.values(), ids=MIDWAY.keys())
@pytest.mark.parametrize("after", [1, 2])
def test_what_happens_between_two_buckets_leaves_the_step_exact(
    start: Start, happens: Callable[[Run], None], after: int
) -> None:
    run = start()
    buckets = run.buckets(4)
    order = ORDERS["bucket by bucket"]
    for step in range(4):
        run.step_in_buckets(step, buckets, order)
    before = run.foretold
    run.fill(4)
    for bucket in buckets[:after]:
        for worker in range(M):
            run.push(4, worker, only=bucket)
    run.clients[0].await_slices(5, buckets[after - 1])
    happens(run)
    for bucket in buckets[after:]:
        for worker in range(M):
            run.push(4, worker, only=bucket)
    for client in run.clients:
        assert client.wait(5).version == 5
    for step in range(5, 9):
        run.step_in_buckets(step, buckets, order)
    assert run.foretold > before
    _assert_as_undisturbed(run, start, 9)


@needs_a_compiler
def test_rows_that_change_between_two_buckets_are_taken_as_they_are_without_foretelling(start: Start) -> None:
    quick, plain = start(), start(foretell=False)
    for run in (quick, plain):
        buckets = run.buckets(3)
        for step in range(4):
            run.step_in_buckets(step, buckets, ORDERS["bucket by bucket"])
        run.fill(4)
        for index, bucket in enumerate(buckets):
            for worker in range(M):
                run.push(4, worker, only=bucket, loss=1.0 + index)
        assert run.clients[0].wait(5).stats[0].loss == 3.0
    assert bits_equal(quick.state(), plain.state())


@needs_a_compiler
@pytest.mark.parametrize("bad", [0, 2])
def test_a_gradient_that_is_not_finite_is_named_in_its_bucket(start: Start, bad: int) -> None:
    run = start()
    slices = run.fleet.partition.slices
    buckets = [[piece] for piece in slices]
    for step in range(4):
        run.step_in_buckets(step, buckets, ORDERS["bucket by bucket"])
    before = run.state()
    run.fill(4)
    run.vectors[1][slices[bad].start + 1] = math.nan
    for bucket in buckets:
        for worker in range(M):
            run.push(4, worker, only=bucket)
    with pytest.raises(NonFiniteGradient, match="is not finite in step 5"):
        run.clients[0].wait(5)
    assert run.memory.version == 4
    assert bits_equal(run.state(), before)
    assert run.foretold == 4 - TAUGHT


@needs_a_compiler
def test_members_come_again_between_two_buckets(start: Start) -> None:
    run = start()
    buckets = run.buckets(3)
    for step in range(4):
        run.step_in_buckets(step, buckets, ORDERS["bucket by bucket"])
    run.fill(4)
    for worker in range(M):
        run.push(4, worker, only=buckets[0])
    run.clients[0].await_slices(5, buckets[0])
    run.hub.call(lambda: run.hub.regroup(1)).result(TIMEOUT_S)
    assert not any(run.versions.has(piece, 5) for piece in run.fleet.partition.slices)
    for client in run.clients:
        client.close()
    run.clients = [run.join(worker) for worker in range(M)]
    run.vectors = [client.allocate() for client in run.clients]
    for step in range(4, 9):
        run.step_in_buckets(step, buckets, ORDERS["worker by worker"])
    _assert_as_undisturbed(run, start, 9)
