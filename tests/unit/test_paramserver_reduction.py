"""The canonical tree: the same bits whatever the runs, the order of arrival and the repetitions (E2)."""

import itertools
import math
import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paramserver.errors import OverlappingContribution
from paramserver.reduction import Node, TreeSum, children, maximal_nodes, tree_reduce


def canonical_sum(leaves: list[Tensor]) -> Tensor:
    """The definition, written down independently: split where the left part is the largest smaller power of two."""
    if len(leaves) == 1:
        return leaves[0]
    left = 1
    while 2 * left < len(leaves):
        left *= 2
    return canonical_sum(leaves[:left]) + canonical_sum(leaves[left:])


def all_nodes(root: Node) -> list[Node]:
    if root.hi - root.lo == 1:
        return [root]
    left, right = children(root)
    return [root, *all_nodes(left), *all_nodes(right)]


@st.composite
def arrivals(draw: st.DrawFn) -> tuple[list[Tensor], list[Node]]:
    """Random leaves, and what workers with random runs send: their maximal nodes, shuffled, some more than once."""
    num_microbatches = draw(st.integers(1, 17))
    cuts = draw(st.sets(st.integers(1, num_microbatches - 1))) if num_microbatches > 1 else set()
    bounds = [0, *sorted(cuts), num_microbatches]
    nodes = [node for lo, hi in itertools.pairwise(bounds) for node in maximal_nodes(lo, hi, num_microbatches)]
    repeated = draw(st.lists(st.sampled_from(nodes), max_size=5))
    # What another worker computed before, or after a loss: any node at all, larger or smaller than what is held.
    others = draw(st.lists(st.sampled_from(all_nodes(Node(0, num_microbatches))), max_size=5))
    order = draw(st.permutations(nodes + repeated + others))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 32)))
    scales = 10.0 ** torch.randint(-6, 6, (num_microbatches, 1), generator=generator)
    return list(torch.randn(num_microbatches, 9, generator=generator) * scales), list(order)


@settings(deadline=None)
@given(arrivals())
def test_any_runs_in_any_order_with_repetitions_give_the_bits_of_the_canonical_sum(
    arrival: tuple[list[Tensor], list[Node]],
) -> None:
    leaves, order = arrival
    held = TreeSum[Tensor](len(leaves))
    for node in order:
        held.insert(node, canonical_sum(leaves[node.lo : node.hi]))
    assert held.complete
    assert held.missing() == []
    assert torch.equal(held.reduce(torch.add), canonical_sum(leaves))


@settings(deadline=None)
@given(arrivals())
def test_folding_gives_the_same_bits_as_holding(arrival: tuple[list[Tensor], list[Node]]) -> None:
    leaves, order = arrival
    folded = TreeSum[Tensor](len(leaves))
    for node in order:
        folded.fold(node, canonical_sum(leaves[node.lo : node.hi]), torch.add)
    ((root, total),) = folded.pop_all()
    assert root == (0, len(leaves))
    assert torch.equal(total, canonical_sum(leaves))


def test_a_sum_knows_the_very_objects_that_it_holds() -> None:
    held = TreeSum[Tensor](2)
    left, right = torch.zeros(3), torch.zeros(3)
    held.insert(Node(1, 2), right)
    held.insert(Node(0, 1), left)
    known = held.contributions
    assert held.holds(known), "in whatever order they came"
    assert not held.holds({})
    held.clear()
    assert not held.holds(known)
    assert held.holds({})
    held.insert(Node(0, 1), left)
    held.insert(Node(1, 2), right.clone())
    assert not held.holds(known), "an equal one is another"


def test_the_order_of_a_plain_sum_would_matter() -> None:
    """The properties above would hold for nothing if fp32 sums of such leaves never depended on their order."""
    leaves = list(torch.randn(17, 1000, generator=torch.Generator().manual_seed(0)))
    in_a_row = leaves[0].clone()
    for leaf in leaves[1:]:
        in_a_row += leaf
    assert not torch.equal(in_a_row, canonical_sum(leaves))


@pytest.mark.parametrize(
    ("size", "middle"), [(2, 1), (3, 2), (4, 2), (5, 4), (6, 4), (7, 4), (8, 4), (9, 8), (16, 8), (17, 16)]
)
def test_a_node_splits_at_the_largest_power_of_two_below_its_size(size: int, middle: int) -> None:
    assert children(Node(0, size)) == (Node(0, middle), Node(middle, size))
    assert children(Node(8, 8 + size)) == (Node(8, 8 + middle), Node(8 + middle, 8 + size))


@pytest.mark.parametrize(
    ("num_microbatches", "run", "nodes"),
    [
        (3, (0, 3), [(0, 3)]),
        (3, (1, 3), [(1, 2), (2, 3)]),
        (4, (0, 2), [(0, 2)]),
        (4, (1, 3), [(1, 2), (2, 3)]),
        (4, (1, 4), [(1, 2), (2, 4)]),
        (5, (0, 3), [(0, 2), (2, 3)]),
        (5, (3, 5), [(3, 4), (4, 5)]),
        (6, (0, 3), [(0, 2), (2, 3)]),
        (6, (3, 6), [(3, 4), (4, 6)]),
        (7, (0, 4), [(0, 4)]),
        (7, (4, 7), [(4, 7)]),
        (7, (2, 7), [(2, 4), (4, 7)]),
        (7, (5, 7), [(5, 6), (6, 7)]),
        (4, (2, 2), []),
    ],
)
def test_maximal_nodes_of_known_runs(num_microbatches: int, run: tuple[int, int], nodes: list[tuple[int, int]]) -> None:
    assert maximal_nodes(*run, num_microbatches) == nodes


def test_aligned_runs_are_one_node() -> None:
    for num_microbatches in (1, 2, 4, 8, 16, 32):
        size = num_microbatches
        while size:
            for lo in range(0, num_microbatches, size):
                assert maximal_nodes(lo, lo + size, num_microbatches) == [(lo, lo + size)]
            size //= 2


def test_any_run_is_at_most_two_log2_nodes_that_tile_it() -> None:
    for num_microbatches in range(2, 34):
        for lo, hi in itertools.combinations(range(num_microbatches + 1), 2):
            nodes = maximal_nodes(lo, hi, num_microbatches)
            assert len(nodes) <= 2 * math.log2(num_microbatches)
            assert [index for node in nodes for index in range(*node)] == list(range(lo, hi))


def test_a_covered_contribution_is_dropped_and_a_covering_one_replaces() -> None:
    held = TreeSum[str](4)
    assert held.insert(Node(0, 1), "0")
    assert not held.insert(Node(0, 1), "again")
    assert held.insert(Node(0, 2), "01")
    assert not held.insert(Node(1, 2), "1")
    assert held.missing() == [2, 3]
    assert not held.complete
    assert held.insert(Node(2, 3), "2")
    assert held.insert(Node(3, 4), "3")
    assert held.reduce(lambda left, right: f"({left}+{right})") == "(01+(2+3))"
    assert held.insert(Node(0, 4), "all")
    assert list(held.pop_all()) == [((0, 4), "all")]
    assert held.missing() == [0, 1, 2, 3]


@pytest.mark.parametrize("node", [(1, 3), (0, 3), (1, 4), (0, 5), (4, 5), (-1, 1), (2, 2), (3, 2)])
def test_what_is_no_node_of_the_tree_is_refused_by_name(node: tuple[int, int]) -> None:
    held = TreeSum[str](4)
    with pytest.raises(OverlappingContribution, match=rf"\[{node[0]}, {node[1]}\) are no node .* 4 microbatches"):
        held.insert(Node(*node), "")
    assert held.missing() == [0, 1, 2, 3]


@pytest.mark.parametrize("num_microbatches", [1, 2, 3, 7, 8, 17, 64])
def test_folding_a_run_in_order_holds_as_many_values_as_a_binary_counter_has_ones(num_microbatches: int) -> None:
    for count in range(1, num_microbatches + 1):
        folded = TreeSum[int](num_microbatches)
        for index in range(count):
            folded.fold(Node(index, index + 1), 1 << index, operator.add)
        held = list(folded.pop_all())
        assert len(held) == (1 if count == num_microbatches else count.bit_count())
        assert sum(value for _, value in held) == (1 << count) - 1


def test_tree_reduce_adds_left_to_right_and_uses_the_largest_that_is_held() -> None:
    held = {Node(0, 2): "ab", Node(2, 3): "c", Node(3, 4): "d", Node(4, 5): "e"}
    assert tree_reduce(Node(0, 5), held.get, lambda left, right: f"({left}{right})") == "((ab(cd))e)"
