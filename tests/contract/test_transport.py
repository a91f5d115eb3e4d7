"""What every transport must do, one body for all: the exact result or the named error, never anything between."""

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from paramserver.config import OptimizerConfig, ServerConfig
from paramserver.errors import (
    NonFiniteGradient,
    OverlappingContribution,
    PartitionMismatch,
    PushPullError,
    PushRefused,
    ReplicaMismatch,
    StaleContribution,
    StepTimeout,
    VersionGone,
)
from paramserver.messages import Push
from paramserver.partition import KeySpec, make_partition
from paramserver.reduction import Node, children, maximal_nodes, tree_reduce
from paramserver.state import State
from tests.support.links import Link, in_process_link, ray_link, relayed_link, shared_memory_link
from tests.support.servers import TIMEOUT_S, Fleet, bits_equal, rows_of
from workers.minibatch import deal_runs

pytestmark = [
    # Arrays out of Ray's store are read-only; they are never written. A worker actor says the same.
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable"),
]

LINKS = {
    "in-process": in_process_link,
    "shared-memory": shared_memory_link,
    "relayed": relayed_link,
    "ray": ray_link,
}
"""A new transport is added here, and nowhere else in this file."""

NUM_SERVERS = 2
M = 4
LEAVES = [Node(index, index + 1) for index in range(M)]


@pytest.fixture(scope="module", params=LINKS.values(), ids=LINKS.keys())
def link(request: pytest.FixtureRequest) -> Iterator[Link]:
    with request.param(NUM_SERVERS) as started:
        yield started


def _values() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "conv": torch.randn(4, 3, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last),
        "bias": torch.randn((), generator=generator),
        "large": torch.randn(23, 17, generator=generator),
        "bn.mean": torch.randn(5, generator=generator),
    }


def _fleet(link: Link, optimizer: OptimizerConfig | None = None, **settings: Any) -> Fleet:
    settings = {"num_servers": NUM_SERVERS, "buffers": ["bn.mean"], **settings}
    fleet = Fleet(_values(), optimizer, num_microbatches=M, **settings)
    link.start(fleet)
    return fleet


def _leaves(seed: int, M: int = M) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(100 + seed)
    return [
        {name: torch.randn(value.shape, generator=generator) for name, value in _values().items()} for _ in range(M)
    ]


def _sum(leaves: list[dict[str, Tensor]], node: Node) -> dict[str, Tensor]:
    if node.hi - node.lo == 1:
        return leaves[node.lo]
    left, right = (_sum(leaves, child) for child in children(node))
    return {name: left[name] + right[name] for name in left}


def _expected(optimizer: OptimizerConfig | None, steps: int, **settings: Any) -> State:
    """What one server makes of the whole sums."""
    fleet = Fleet(_values(), optimizer, num_microbatches=M, buffers=["bn.mean"], **settings)
    for step in range(steps):
        fleet.step(_sum(_leaves(step), fleet.root))
    return fleet.state()


def _pulled(fleet: Fleet, link: Link, version: int) -> dict[str, Tensor]:
    out = torch.full((fleet.partition.length,), torch.nan)
    link.client(fleet).pull(version, out)
    return fleet.partition.unflatten(out)


def _assert_version(fleet: Fleet, link: Link, version: int, optimizer: OptimizerConfig | None = None) -> None:
    """The servers hold what undisturbed steps give, to the bit."""
    assert bits_equal(_pulled(fleet, link, version), dict(_expected(optimizer, version).values))


def _take_step(fleet: Fleet, link: Link, step: int, nodes: list[Node] | None = None) -> None:
    client = link.client(fleet)
    for node in nodes or LEAVES:
        client.push(step, node, fleet.flatten(_sum(_leaves(step), node)), rows_of(node), {})
    assert client.wait(step + 1).version == step + 1


def _send(link: Link, server: int, push: Push, version: int, timeout_s: float = TIMEOUT_S) -> None:
    """Push by a transport of its own and make one more call, by which an error must have come once it was taken."""
    transport = link.transport()
    transport.push(server, push)
    link.settle()
    transport.wait(server, version, timeout_s)


# -- the exact result --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_shuffled_and_repeated_pushes_of_any_workers_give_the_exact_result(link: Link, seed: int) -> None:
    optimizer = OptimizerConfig(lr=0.1, momentum=0.9)
    fleet = _fleet(link, optimizer)
    order = random.Random(seed)
    for step in range(3):
        num_workers = order.randint(1, M)
        runs = deal_runs(M, num_workers)
        clients = [link.client(fleet, worker) for worker in range(num_workers)]
        echo = link.client(fleet, 99)
        pushes = [(client, node) for client, run in zip(clients, runs, strict=True) for node in _split(run, order)]
        # One contribution comes last and only once, so that the step is open for all that repeats the others.
        last = pushes.pop(order.randrange(len(pushes)))
        again = [node for node in (*LEAVES, Node(0, 2), Node(2, 4)) if node.disjoint(last[1])]
        pushes += [(echo, node) for node in (order.choices(again, k=3) if again else [])]
        order.shuffle(pushes)
        for client, node in [*pushes, last]:
            if node is last[1]:
                link.settle()
            client.push(step, node, fleet.flatten(_sum(_leaves(step), node)), rows_of(node), {})
        for client in order.sample([*clients, echo], num_workers + 1):
            assert client.wait(step + 1).version == step + 1
    _assert_version(fleet, link, 3, optimizer)


def _split(run: range, order: random.Random) -> list[Node]:
    """Maximal nodes of a run, or all its microbatches one by one."""
    nodes = maximal_nodes(run.start, run.stop, M)
    return nodes if order.random() < 0.5 else [leaf for leaf in LEAVES if any(node.covers(leaf) for node in nodes)]


def test_versions_come_back_whole_and_in_the_keys_own_memory_order(link: Link) -> None:
    fleet = _fleet(link)
    pulled = _pulled(fleet, link, 0)
    assert bits_equal(pulled, _values())
    assert pulled["conv"].is_contiguous(memory_format=torch.channels_last)


def test_a_worker_may_overwrite_what_it_pushed_once_the_wait_has_returned(link: Link) -> None:
    fleet = _fleet(link)
    client = link.client(fleet)
    out, vector = torch.empty(fleet.partition.length), torch.empty(fleet.partition.length)
    for step in range(2):
        client.pull(step, out)
        vector.copy_(fleet.flatten(_sum(_leaves(step), fleet.root)))
        client.push(step, fleet.root, vector, rows_of(fleet.root), {})
        client.wait(step + 1)
        vector.fill_(torch.nan)
        out.fill_(torch.nan)
    _assert_version(fleet, link, 2)


def test_a_prepared_push_sends_what_its_vector_holds_when_it_is_called(link: Link) -> None:
    """Preparing is done before backward, which writes the gradients."""
    fleet = _fleet(link)
    client = link.client(fleet)
    vectors = [client.allocate() for _ in LEAVES]
    for step in range(3):
        sends = [
            client.prepare(step, leaf, vector, rows_of(leaf), {}) for leaf, vector in zip(LEAVES, vectors, strict=True)
        ]
        for leaf, vector in zip(LEAVES, vectors, strict=True):
            vector.copy_(fleet.flatten(_leaves(step)[leaf.lo]))
        for send in sends:
            send()
        assert client.wait(step + 1).version == step + 1
    _assert_version(fleet, link, 3)


def test_a_commit_tells_what_was_applied(link: Link) -> None:
    fleet = _fleet(link, OptimizerConfig(lr=0.5, schedule="step", total_steps=3, decay_factor=0.5))
    client = link.client(fleet, worker=3)
    client.push(0, fleet.root, fleet.flatten({}), rows_of(fleet.root, loss=2.5, weight=3.0, samples=2), {})
    commit = client.wait(1)
    assert commit.stats == rows_of(fleet.root, loss=2.5, weight=3.0, samples=2)
    assert (commit.version, commit.lr, commit.skipped, commit.grad_norm) == (1, 0.5, False, None)
    assert (commit.last_worker, commit.stop) == (3, False)
    client.push(1, fleet.root, fleet.flatten({}), rows_of(fleet.root), {})
    assert client.wait(2).lr == 0.25


def test_integer_buffers_and_frozen_keys_travel(link: Link) -> None:
    state = State(
        version=7,
        values=_values(),
        integers={"seen": torch.tensor(6), "flags": torch.tensor([[True], [False]])},
        constants={"frozen": torch.randn(2, 3, dtype=torch.float64)},
    )
    fleet = _fleet(link, state=state)
    client = link.client(fleet)
    assert client.version == 7
    assert torch.equal(client.constants["frozen"], state.constants["frozen"])
    out = torch.empty(fleet.partition.length)
    assert client.pull(7, out)["seen"] == 6
    changed = {"seen": torch.tensor(7)}
    client.push(7, fleet.root, fleet.flatten({}), rows_of(fleet.root), changed)
    client.wait(8)
    changed["seen"] += 100
    integers = client.pull(8, out)
    assert integers.keys() == {"seen", "flags"}
    assert integers["seen"] == 7
    assert integers["flags"].tolist() == [[True], [False]]


def test_clipping_is_decided_once_for_all_servers(link: Link) -> None:
    optimizer = OptimizerConfig(lr=0.1, momentum=0.9, clip_grad_norm=0.5)
    fleet = _fleet(link, optimizer)
    client = link.client(fleet)
    for step in range(2):
        client.push(step, fleet.root, fleet.flatten(_sum(_leaves(step), fleet.root)), rows_of(fleet.root), {})
        norm = client.wait(step + 1).grad_norm
        assert norm is not None
        assert norm > 0.5
    _assert_version(fleet, link, 2, optimizer)


def test_a_server_without_slices_joins_the_vote(link: Link) -> None:
    optimizer = OptimizerConfig(lr=1.0, clip_grad_norm=100.0)
    fleet = Fleet({"w": torch.zeros(3)}, optimizer, num_servers=NUM_SERVERS)
    assert [len(pieces) for pieces in fleet.partition.by_server] == [1, 0]
    link.start(fleet)
    client = link.client(fleet)
    for step in range(2):
        client.push(step, fleet.root, fleet.flatten({"w": torch.ones(3)}), rows_of(fleet.root), {})
        assert client.wait(step + 1).grad_norm == pytest.approx(math.sqrt(3))
    assert torch.equal(_pulled(fleet, link, 2)["w"], torch.full((3,), -2.0))


def test_it_has_one_server_where_the_partition_has_one(link: Link) -> None:
    fleet = _fleet(link, num_servers=1)
    assert link.transport().num_servers == 1
    _take_step(fleet, link, 0)
    _assert_version(fleet, link, 1)


# -- the named error ---------------------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[dict[str, Any], type[PushPullError], str]] = {
    "an old step": ({"step": -1}, StaleContribution, "server 0 has committed version 1 already"),
    "a step that is not open": ({"step": 2}, PushRefused, "not open yet"),
    "another life of the run": ({"run": "run-1"}, StaleContribution, "of run run-1"),
    "an older generation": ({"generation": -1}, StaleContribution, "generation -1"),
    "no tree node": ({"node": Node(1, 3), "stats": rows_of(Node(1, 3))}, OverlappingContribution, r"\[1, 3\)"),
    "other rows": ({"stats": rows_of(Node(0, 2))}, PartitionMismatch, "rows"),
    "too small": ({"slices": {0: torch.zeros(63)}}, PartitionMismatch, r"slice 0 is .*\(63,\), wanted .*\(64,\)"),
    "too large": ({"slices": {0: torch.zeros(65)}}, PartitionMismatch, r"\(65,\)"),
    "float64": ({"slices": {0: torch.zeros(64).double()}}, PartitionMismatch, "slice 0 is torch.float64"),
    "float16": ({"slices": {0: torch.zeros(64).half()}}, PartitionMismatch, "slice 0 is torch.float16"),
    "a slice of the other server": ({"slices": {1: torch.zeros(64)}}, PartitionMismatch, "slice 1 is not on server 0"),
}


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused_by_name_and_the_step_stays_exact(
    link: Link, changes: dict[str, Any], error: type[PushPullError], message: str
) -> None:
    fleet = _fleet(link)
    _take_step(fleet, link, 0)
    fields: dict[str, Any] = {"step": 1, "node": LEAVES[0], "values": {"large": torch.full((23, 17), 1e6)}, **changes}
    with pytest.raises(PushRefused, match=message) as caught:
        _send(link, 0, fleet.push(**fields), version=1)
    assert type(caught.value) is error
    _take_step(fleet, link, 1)
    _assert_version(fleet, link, 2)


def test_integer_buffers_that_disagree_are_named(link: Link) -> None:
    fleet = _fleet(link, integers={"seen": torch.tensor(0)})
    one, other = (fleet.push(0, node, {}, integers={"seen": torch.tensor(node.lo)}) for node in LEAVES[:2])
    link.transport().push(0, one)
    link.settle()
    with pytest.raises(ReplicaMismatch, match=r"'seen' differs .* step 0"):
        _send(link, 0, other, version=1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_named_to_every_worker(link: Link, value: float) -> None:
    fleet = _fleet(link, num_servers=1)
    _take_step(fleet, link, 0)
    clients = [link.client(fleet, worker) for worker in range(2)]
    spoilt = {**_leaves(1)[0], "bias": torch.tensor(value)}
    for client, node, values in zip(clients, [Node(0, 2), Node(2, 4)], [_leaves(1)[1], spoilt], strict=True):
        client.push(1, node, fleet.flatten(values), rows_of(node), {})
    for client in clients:
        with pytest.raises(NonFiniteGradient, match=r"'bias' is not finite in step 2.*--on-nan skip") as caught:
            client.wait(2)
        assert caught.value.details == {"key": "bias", "step": 2}
    _assert_version(fleet, link, 1)


def test_with_skip_a_gradient_that_is_not_finite_drops_the_step_on_all_servers(link: Link) -> None:
    fleet = _fleet(link, OptimizerConfig(lr=1.0, on_nan="skip"))
    client = link.client(fleet)
    for step, value in enumerate([math.nan, math.inf]):
        spoilt = {**_leaves(step)[0], "bias": torch.tensor(value)}
        client.push(step, fleet.root, fleet.flatten(spoilt), rows_of(fleet.root), {})
        commit = client.wait(step + 1)
        assert (commit.version, commit.skipped) == (step + 1, True)
        assert bits_equal(_pulled(fleet, link, step + 1), _values())
    client.push(2, fleet.root, fleet.flatten(_sum(_leaves(0), fleet.root)), rows_of(fleet.root), {})
    assert not client.wait(3).skipped
    assert bits_equal(_pulled(fleet, link, 3), dict(_expected(None, 1).values))


def test_a_wait_past_its_deadline_names_the_missing_microbatches(link: Link) -> None:
    fleet = _fleet(link)
    client = link.client(fleet, timeout_s=link.deadline_s)
    for node in (LEAVES[0], LEAVES[2]):
        client.push(0, node, fleet.flatten(_leaves(0)[node.lo]), rows_of(node), {})
    with pytest.raises(StepTimeout, match=r"step 1: server 0 waits for microbatches \[1, 3\] .*--step-timeout"):
        client.wait(1)
    _take_step(fleet, link, 0, [LEAVES[1], LEAVES[3]])
    _assert_version(fleet, link, 1)


@pytest.mark.parametrize("version", [-1, 2, 3])
def test_a_version_that_is_not_held_is_gone(link: Link, version: int) -> None:
    fleet = _fleet(link)
    _take_step(fleet, link, 0)
    with pytest.raises(VersionGone, match=f"server 0 has version 1, not {version}"):
        link.transport().fetch(0, version, TIMEOUT_S)


def test_the_version_before_can_be_fetched_until_the_next_step_is_pushed(link: Link) -> None:
    """Where one server has committed and another has not, workers go on from the version that both have."""
    fleet = _fleet(link)
    before = [value.clone() for value in link.transport().fetch(0, 0, TIMEOUT_S)[0]]
    _take_step(fleet, link, 0)
    assert all(map(torch.equal, link.transport().fetch(0, 0, TIMEOUT_S)[0], before))


def test_a_worker_that_cuts_otherwise_is_refused_before_its_first_push(link: Link) -> None:
    fleet = _fleet(link)
    fleet.partition = make_partition([KeySpec("other", (9,), (1,), 0)], ServerConfig(num_servers=NUM_SERVERS))
    with pytest.raises(PartitionMismatch, match="worker 0 and server 0 cut the parameters differently"):
        link.client(fleet)


def test_the_reference_of_this_file_is_the_canonical_tree() -> None:
    leaves = [{"w": torch.tensor([float(1 << index)])} for index in range(7)]
    root = Node(0, 7)
    held = {node: leaves[node.lo]["w"] for node in itertools.starmap(Node, zip(range(7), range(1, 8), strict=True))}
    assert torch.equal(_sum(leaves, root)["w"], tree_reduce(root, held.get, torch.add))
