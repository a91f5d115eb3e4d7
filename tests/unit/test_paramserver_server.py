"""What a server refuses, by which name, and that a refused push changes nothing."""

import itertools
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from paramserver.config import OptimizerConfig
from paramserver.errors import (
    NonFiniteGradient,
    OverlappingContribution,
    PartitionMismatch,
    PushPullError,
    PushRefused,
    ReplicaMismatch,
    StaleContribution,
    VersionGone,
)
from paramserver.messages import MicrobatchStats
from paramserver.reduction import Node
from tests.support.servers import Fleet, bits_equal, rows_of

M = 4
LEAVES = [Node(index, index + 1) for index in range(M)]


def _start() -> dict[str, Tensor]:
    return {"first": torch.arange(100.0), "second": torch.ones(3, 5)}


def _gradients(scale: float) -> dict[str, Tensor]:
    return {"first": torch.full((100,), scale), "second": torch.full((3, 5), 2 * scale)}


def _fleet(optimizer: OptimizerConfig | None = None, **settings: Any) -> Fleet:
    return Fleet(_start(), optimizer, num_microbatches=M, **settings)


def _complete(fleet: Fleet, step: int = 0, nodes: list[Node] | None = None) -> None:
    """Push microbatch i's gradient, 4 x (i + 1), for every node; the mean over the four is 10."""
    for node in nodes or LEAVES:
        total = 4.0 * sum(range(node.lo + 1, node.hi + 1))
        for server in range(len(fleet.servers)):
            fleet.group.push(server, fleet.push(step, node, _gradients(total), server))


def _expect_steps(fleet: Fleet, steps: int) -> None:
    values = fleet.state().values
    assert fleet.state().version == steps
    assert torch.equal(values["first"], _start()["first"] - 10 * steps)
    assert torch.equal(values["second"], _start()["second"] - 20 * steps)


def test_the_mean_of_known_pushes_is_applied_once() -> None:
    fleet = _fleet(num_servers=2)
    _complete(fleet)
    fleet.client().wait(1)
    _expect_steps(fleet, 1)


REFUSED: dict[str, tuple[dict[str, Any], type[PushPullError], str]] = {
    "a step committed long ago": ({"step": -1}, StaleContribution, "worker 0 for step -1: server 0 has committed"),
    "a step that is not open yet": ({"step": 2}, PushRefused, "step 2: server 0 is at version 1, .* not open yet"),
    "another run": ({"run": "run-1"}, StaleContribution, "of run run-1, generation 0, an earlier one"),
    "an older generation": ({"generation": -1}, StaleContribution, "generation -1, an earlier one"),
    "no tree node": ({"node": Node(1, 3), "stats": rows_of(Node(1, 3))}, OverlappingContribution, r"\[1, 3\)"),
    "too many microbatches": ({"node": Node(0, 8), "stats": rows_of(Node(0, 8))}, OverlappingContribution, r"\[0, 8\)"),
    "rows of other microbatches": ({"stats": rows_of(Node(2, 3))}, PartitionMismatch, r"rows .* \[1, 2\)"),
    "too few rows": ({"stats": ()}, PartitionMismatch, "rows"),
    "too many rows": ({"stats": rows_of(Node(1, 3))}, PartitionMismatch, "rows"),
    "a slice of another server": ({"slices": {1: torch.zeros(64)}}, PartitionMismatch, "slice 1 is not on server 0"),
    "a slice that nobody has": ({"slices": {99: torch.zeros(64)}}, PartitionMismatch, "slice 99 is not on server 0"),
    "too small a slice": ({"slices": {0: torch.zeros(63)}}, PartitionMismatch, r"\(63,\), wanted float32 \(64,\)"),
    "another shape": ({"slices": {0: torch.zeros(8, 8)}}, PartitionMismatch, r"\(8, 8\), wanted float32 \(64,\)"),
    "float64": ({"slices": {0: torch.zeros(64).double()}}, PartitionMismatch, "is torch.float64"),
    "float16": ({"slices": {0: torch.zeros(64).half()}}, PartitionMismatch, "is torch.float16"),
}


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(
    changes: dict[str, Any], error: type[PushPullError], message: str
) -> None:
    fleet = _fleet(num_servers=2)
    _complete(fleet)
    fleet.client().wait(1)
    _complete(fleet, 1, [LEAVES[0]])
    server = fleet.servers[0]
    fields: dict[str, Any] = {"step": 1, "node": LEAVES[1], "values": _gradients(1e6), **changes}
    with pytest.raises(PushRefused, match=message) as caught:
        server.push(fleet.push(**fields))
    assert type(caught.value) is error
    assert (server.version, server.missing(), server.complete) == (1, [1, 2, 3], False)
    _complete(fleet, 1)
    fleet.client().wait(2)
    _expect_steps(fleet, 2)


def test_a_raised_generation_refuses_the_one_before() -> None:
    fleet = _fleet()
    fleet.servers[0]._step.generation = 3
    with pytest.raises(StaleContribution, match="generation 2"):
        fleet.servers[0].push(fleet.push(0, LEAVES[0], {}, generation=2))
    fleet.servers[0].push(fleet.push(0, LEAVES[0], {}, generation=3))
    assert fleet.servers[0].missing() == [1, 2, 3]
    assert fleet.client().push(0, LEAVES[1], torch.zeros(fleet.partition.length), rows_of(LEAVES[1]), {}) is None
    assert fleet.servers[0].missing() == [2, 3]


# -- exactly once ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra",
    [
        [*LEAVES, *LEAVES],
        [LEAVES[2], LEAVES[2], LEAVES[0], LEAVES[3], LEAVES[1], LEAVES[0]],
        [LEAVES[0], Node(0, 2), LEAVES[1], Node(2, 4), LEAVES[3]],
        [LEAVES[3], LEAVES[1], Node(0, 4), LEAVES[0], Node(0, 2)],
    ],
)
def test_repetitions_and_larger_nodes_are_not_applied_twice(extra: list[Node]) -> None:
    fleet = _fleet(num_servers=2)
    for step in range(3):
        _complete(fleet, step, extra)
        fleet.client().wait(step + 1)
    _expect_steps(fleet, 3)


def test_a_repetition_with_other_numbers_is_ignored_as_a_whole() -> None:
    """A worker that computed again sends the same; whatever comes second must not be half of the answer."""
    fleet = _fleet()
    _complete(fleet, 0, LEAVES[:2])
    again = (MicrobatchStats(0, 1e6, 1000.0, 1000),)
    fleet.servers[0].push(fleet.push(0, LEAVES[0], _gradients(1e6), stats=again, worker=7))
    _complete(fleet, 0, LEAVES[2:])
    commit = fleet.client().wait(1)
    assert [row.weight for row in commit.stats] == [1.0] * M
    _expect_steps(fleet, 1)


def test_a_push_may_bring_some_of_the_slices_now_and_the_others_later() -> None:
    fleet = _fleet()
    for node in LEAVES:
        whole = fleet.push(0, node, _gradients(4.0 * (node.lo + 1)))
        for index, values in reversed(whole.slices.items()):
            assert not fleet.servers[0].complete
            fleet.servers[0].push(fleet.push(0, node, {}, slices={index: values}))
    assert fleet.servers[0].complete
    fleet.client().wait(1)
    _expect_steps(fleet, 1)


def test_the_order_of_arrival_does_not_change_the_divisor() -> None:
    """Weights that are no counts (a class-weighted loss): a float64 sum of them depends on its order."""
    weights = [1.0, 2.0**-24, 2.0**-53, 2.0**-53]
    results = set()
    for order in itertools.permutations(range(M)):
        fleet = _fleet()
        for index in order:
            node = LEAVES[index]
            fleet.group.push(0, fleet.push(0, node, _gradients(1.0), stats=rows_of(node, weight=weights[index])))
        fleet.client().wait(1)
        results.add(tuple(fleet.state().values["first"].tolist()))
    assert len(results) == 1


# -- integer buffers ---------------------------------------------------------------------------------------------------


def _with_counter(**settings: Any) -> Fleet:
    integers = {"bn.seen": torch.tensor(5), "mask": torch.tensor([True, False])}
    return Fleet(_start(), num_microbatches=M, integers=integers, **settings)


def test_integer_buffers_that_agree_become_the_next_version() -> None:
    fleet = _with_counter(num_servers=2)
    client = fleet.client()
    for node in LEAVES:
        changed = {"bn.seen": torch.tensor(6)} if node.lo else {}  # the first microbatch was empty
        client.push(0, node, fleet.flatten(_gradients(4.0 * (node.lo + 1))), rows_of(node), changed)
    client.wait(1)
    integers = client.pull(1, torch.empty(fleet.partition.length))
    assert (integers["bn.seen"], integers["mask"].tolist()) == (6, [True, False])
    assert fleet.state().integers["bn.seen"].dtype == torch.int64
    _expect_steps(fleet, 1)


def test_integer_buffers_that_disagree_are_refused_by_name_and_change_nothing() -> None:
    fleet = _with_counter()
    server = fleet.servers[0]
    server.push(fleet.push(0, LEAVES[0], _gradients(4.0), integers={"bn.seen": torch.tensor(6)}))
    others = {"mask": torch.tensor([True, True]), "bn.seen": torch.tensor(7)}
    with pytest.raises(ReplicaMismatch, match=r"buffer 'bn.seen' differs between .* step 0 .*6.*7"):
        server.push(fleet.push(0, LEAVES[1], _gradients(1e6), integers=others))
    assert server.missing() == [1, 2, 3]
    for node in LEAVES[1:]:
        agreed = {"mask": torch.tensor([True, False]), "bn.seen": torch.tensor(6)}
        server.push(fleet.push(0, node, _gradients(4.0 * (node.lo + 1)), integers=agreed))
    fleet.client().wait(1)
    assert fleet.state().integers["mask"].tolist() == [True, False]
    _expect_steps(fleet, 1)


def test_what_a_worker_does_with_its_buffer_afterwards_does_not_reach_the_server() -> None:
    fleet = _with_counter()
    own = torch.tensor(6)
    fleet.group.push(0, fleet.push(0, Node(0, 4), {}, integers={"bn.seen": own}))
    own.fill_(99)
    fleet.client().wait(1)
    assert fleet.state().integers["bn.seen"] == 6


# -- gradients that are not finite -------------------------------------------------------------------------------------


def _spoilt(key: str, value: float) -> dict[str, Tensor]:
    gradients = _gradients(40.0)
    gradients[key].view(-1)[-1] = value
    return gradients


@pytest.mark.parametrize("clip", [None, 1e9])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["first", "second"])
def test_a_gradient_that_is_not_finite_ends_the_run_by_its_name(key: str, value: float, clip: float | None) -> None:
    fleet = _fleet(OptimizerConfig(lr=1.0, momentum=0.5, clip_grad_norm=clip))
    _complete(fleet)
    fleet.client().wait(1)
    before = fleet.state()
    client = fleet.client()
    client.push(1, fleet.root, fleet.flatten(_spoilt(key, value)), rows_of(fleet.root), {})
    with pytest.raises(NonFiniteGradient, match=f"'{key}' is not finite in step 2.*--on-nan skip") as caught:
        client.wait(2)
    assert caught.value.details == {"key": key, "step": 2}
    assert fleet.servers[0].version == 1
    assert bits_equal(dict(fleet.state().values), dict(before.values))
    assert bits_equal(
        {name: state["momentum_buffer"] for name, state in fleet.state().optimizer.items()},
        {name: state["momentum_buffer"] for name, state in before.optimizer.items()},
    )
    # What was pushed is held; a second push of the same microbatches is a repetition and does not heal the step.
    client.push(1, fleet.root, fleet.flatten(_gradients(40.0)), rows_of(fleet.root), {})
    with pytest.raises(NonFiniteGradient, match=key):
        fleet.client().wait(2)
    with pytest.raises(NonFiniteGradient, match=key):
        _update_alone(fleet)
    assert fleet.servers[0].version == 1


def _update_alone(fleet: Fleet) -> None:
    from paramserver.vote import decide

    server = fleet.servers[0]
    server.update(decide([server.report()], fleet.optimizer) if fleet.optimizer.needs_vote else None)


def test_finite_gradients_whose_sum_over_a_slice_overflows_are_not_refused() -> None:
    fleet = _fleet(OptimizerConfig(lr=2.0**-100))
    fleet.step(_gradients(1e38))
    assert fleet.state().version == 1


@pytest.mark.parametrize("num_servers", [1, 2, 3])
def test_with_skip_the_version_goes_on_and_nothing_else_changes(num_servers: int) -> None:
    config = OptimizerConfig(lr=1.0, momentum=0.5, on_nan="skip", schedule="step", total_steps=9, decay_steps=2)
    values = {**_start(), "bn.mean": torch.tensor([0.1, -0.0])}
    fleet = Fleet(values, config, num_servers=num_servers, buffers=["bn.mean"], integers={"seen": torch.tensor(1)})
    seen = {"seen": torch.tensor(2)}
    assert not fleet.step({**_gradients(1.0), "bn.mean": torch.ones(2)}, integers=seen).skipped
    before = fleet.state()
    commit = fleet.step({**_spoilt("second", math.nan), "bn.mean": torch.ones(2)}, integers={"seen": torch.tensor(3)})
    assert (commit.version, commit.skipped) == (2, True)
    assert len(commit.stats) == 1
    after = fleet.state()
    assert after.version == 2
    assert bits_equal(dict(after.values), dict(before.values))
    assert after.integers["seen"] == 2
    for name, state in before.optimizer.items():
        assert bits_equal(dict(after.optimizer[name]), dict(state))
    # The learning rate is one of the version, so a dropped step counts for it.
    commit = fleet.step({**_gradients(1.0), "bn.mean": torch.zeros(2)}, integers={"seen": torch.tensor(3)})
    assert (commit.skipped, commit.lr) == (False, 0.1)
    assert fleet.state().integers["seen"] == 3


# -- versions ----------------------------------------------------------------------------------------------------------


def test_a_held_version_stays_until_it_is_released() -> None:
    fleet = _fleet()
    server = fleet.servers[0]
    server.hold(0)
    _complete(fleet)
    fleet.client().wait(1)  # writes the other version: nothing waits for that
    _complete(fleet, 1)
    assert (server.complete, server.ready) == (True, False)
    assert torch.equal(fleet.state(0).values["first"], _start()["first"])
    assert torch.equal(torch.cat(server.values(0)), server.flat(0))
    assert server.integers(0) == {}
    server.hold(0)
    server.release(0)
    assert not server.ready, "two held it, one released it"
    server.release(0)
    assert server.ready
    fleet.client().wait(2)
    _expect_steps(fleet, 2)
    with pytest.raises(VersionGone, match="server 0 has version 2, not 0"):
        server.values(0)


@pytest.mark.parametrize("version", [2, -1, 17])
@pytest.mark.parametrize("read", ["values", "flat", "integers", "snapshot", "hold"])
def test_a_version_that_is_not_in_memory_is_gone(read: str, version: int) -> None:
    fleet = _fleet()
    _complete(fleet)
    fleet.client().wait(1)
    with pytest.raises(VersionGone, match=re.escape(f"server 0 has version 1, not {version}")):
        getattr(fleet.servers[0], read)(version)


def test_the_version_being_written_is_not_readable_before_its_commit() -> None:
    fleet = _fleet()
    _complete(fleet)
    server = fleet.servers[0]
    server.update()
    assert server.version == 0
    with pytest.raises(VersionGone):
        server.values(1)
    assert torch.equal(fleet.state().values["first"], _start()["first"])
    assert server.commit().version == 1
    _expect_steps(fleet, 1)


def test_a_server_without_slices_takes_part() -> None:
    fleet = Fleet({"w": torch.zeros(3)}, OptimizerConfig(lr=1.0, clip_grad_norm=100.0), num_servers=3)
    assert [len(pieces) for pieces in fleet.partition.by_server] == [1, 0, 0]
    fleet.step({"w": torch.ones(3)})
    assert torch.equal(fleet.state().values["w"], -torch.ones(3))
    assert {server.version for server in fleet.servers} == {1}


def test_a_repetition_that_comes_after_the_commit_is_answered_and_not_applied() -> None:
    """Transports may deliver twice, and late: the sender has done nothing wrong."""
    fleet = _fleet()
    _complete(fleet, 0)
    fleet.client().wait(1)
    fleet.servers[0].push(fleet.push(0, LEAVES[0], {}))
    _complete(fleet, 1)
    fleet.client().wait(2)
    _expect_steps(fleet, 2)
