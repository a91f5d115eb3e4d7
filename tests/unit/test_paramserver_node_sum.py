"""Sums over a node's workers leave every bit as it would be without them, and fewer pushes go on."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paramserver.config import OptimizerConfig
from paramserver.errors import PartitionMismatch, ReplicaMismatch
from paramserver.integers import IntegerBlock
from paramserver.messages import Push
from paramserver.node_sum import NodeSum
from paramserver.reduction import Node, maximal_nodes
from tests.support.servers import Fleet, rows_of
from workers.minibatch import deal_runs


def _node_sum(fleet: Fleet, run: range, sent: list[Push], server: int = 0) -> NodeSum:
    vectors = (torch.zeros(fleet.partition.length), torch.zeros(fleet.partition.length))
    hello = fleet.servers[server].hello()
    integers = {hello.version: IntegerBlock.pack(fleet.servers[server].integers(hello.version))}
    return NodeSum(server, fleet.partition, fleet.num_microbatches, run, hello, integers, vectors, sent.append)


def _sum_all(node_sum: NodeSum) -> None:
    scratch = node_sum.new_scratch()
    for index, part in node_sum.ready_parts():
        node_sum.update_part(index, part, scratch)


@given(st.integers(1, 13), st.integers(1, 4), st.integers(1, 3), st.integers(0, 1 << 30))
def test_a_version_has_the_same_bits_with_and_without_sums_on_nodes(M: int, nodes: int, each: int, seed: int) -> None:
    values = {"w": torch.zeros(70), "b": torch.zeros(3)}
    optimizer = OptimizerConfig(lr=0.1, momentum=0.9)
    plain, summed = (Fleet(values, optimizer, num_microbatches=M) for _ in range(2))
    dice = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    for step in range(2):
        for run in deal_runs(M, nodes):
            if not run:
                continue
            sent: list[Push] = []
            node_sum = _node_sum(summed, run, sent)
            tree_nodes = [
                node
                for part in deal_runs(len(run), each)
                for node in maximal_nodes(run.start + part.start, run.start + part.stop, M)
            ]
            dice.shuffle(tree_nodes)
            for node in tree_nodes:
                gradients = {"w": torch.randn(70, generator=generator), "b": torch.randn(3, generator=generator)}
                push = plain.push(step, node, gradients)
                plain.group.push(0, push)
                for _ in range(dice.randint(1, 2)):
                    node_sum.push(push)
                _sum_all(node_sum)
            assert len(sent) == node_sum.pushes
            assert {push.node for push in sent} == set(maximal_nodes(run.start, run.stop, M))
            dice.shuffle(sent)
            for push in sent:
                summed.group.push(0, push)
        for fleet in (plain, summed):
            assert fleet.client().wait(step + 1).version == step + 1
        one, other = plain.state().everything(), summed.state().everything()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_rows_and_buffers_go_on_with_every_push() -> None:
    fleet = Fleet({"w": torch.zeros(100)}, num_microbatches=2, integers={"seen": torch.tensor(0)})
    sent: list[Push] = []
    node_sum = _node_sum(fleet, range(2), sent)
    for index in range(2):
        node = Node(index, index + 1)
        rows = rows_of(node, loss=float(index), weight=2.0)
        node_sum.push(fleet.push(0, node, {}, stats=rows, integers={"seen": torch.tensor(1)}))
    assert node_sum.missing() == []
    _sum_all(node_sum)
    assert [tuple(row.loss for row in push.stats) for push in sent] == [(0.0, 1.0)] * 2
    assert all(push.integers["seen"] == 1 for push in sent)


def test_a_single_contribution_goes_on_as_it_lies() -> None:
    fleet = Fleet({"w": torch.zeros(64)}, num_microbatches=2)
    sent: list[Push] = []
    node_sum = _node_sum(fleet, range(1), sent)
    push = fleet.push(0, Node(0, 1), {"w": torch.ones(64)})
    node_sum.push(push)
    _sum_all(node_sum)
    assert sent[0].slices[0].data_ptr() == push.slices[0].data_ptr()


def test_a_server_without_slices_gets_the_rows() -> None:
    fleet = Fleet({"w": torch.zeros(3)}, num_microbatches=1, num_servers=2)
    assert not fleet.partition.by_server[1]
    sent: list[Push] = []
    node_sum = _node_sum(fleet, range(1), sent, server=1)
    node_sum.push(fleet.push(0, Node(0, 1), {}, server=1))
    _sum_all(node_sum)
    _sum_all(node_sum)
    assert [len(push.stats) for push in sent] == [1]


def test_the_new_version_is_written_beside_the_old_one() -> None:
    fleet = Fleet({"w": torch.zeros(64)}, num_microbatches=1, integers={"seen": torch.tensor(0)})
    node_sum = _node_sum(fleet, range(1), [])
    node_sum.push(fleet.push(0, Node(0, 1), {}))
    _sum_all(node_sum)
    assert not node_sum.updated
    commit = fleet.step({"w": torch.ones(64)}, integers={"seen": torch.tensor(1)})
    server = fleet.servers[0]
    assert node_sum.write(1, {0: server.values(1)[0]}) == [fleet.partition.slices[0]]
    node_sum.arrive(commit, server.integers(1))
    assert node_sum.updated
    assert node_sum.commit([{"aggregate": 1.0}]).server_ms["aggregate"] >= 1000.0
    assert node_sum.version == 1
    assert node_sum.integers(1)["seen"] == 1
    assert torch.equal(node_sum._memory[1][:64], torch.full((64,), -1.0))
    assert node_sum.missing() == [0]


def test_what_a_server_would_refuse_is_refused_here() -> None:
    fleet = Fleet({"w": torch.zeros(64)}, num_microbatches=2, integers={"seen": torch.tensor(0)})
    node_sum = _node_sum(fleet, range(2), [])
    with pytest.raises(PartitionMismatch, match="slice 0"):
        node_sum.push(fleet.push(0, Node(0, 1), {}, slices={0: torch.zeros(3)}))
    node_sum.push(fleet.push(0, Node(0, 1), {}, integers={"seen": torch.tensor(1)}))
    with pytest.raises(ReplicaMismatch, match="seen"):
        node_sum.push(fleet.push(0, Node(1, 2), {}, integers={"seen": torch.tensor(2)}))
