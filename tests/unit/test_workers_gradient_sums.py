"""Sums made by hooks while backward runs: the canonical tree, to the bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from paramserver.config import OptimizerConfig, ServerConfig
from paramserver.errors import ConfigError
from paramserver.reduction import Node, maximal_nodes, tree_reduce
from tests.support.tiny_task import TinyNet
from workers.gradient_sums import GradientSums, plan_deposits
from workers.replica import Replica, describe_model


@st.composite
def runs(draw: st.DrawFn) -> tuple[range, int]:
    """A run of consecutive microbatches, and how many there are in all."""
    M = draw(st.integers(1, 20))
    lo = draw(st.integers(0, M - 1))
    return range(lo, draw(st.integers(lo + 1, M))), M


@given(runs())
def test_the_plan_adds_along_the_canonical_tree(case: tuple[range, int]) -> None:
    run, M = case
    deposits, nodes = plan_deposits(run, M)
    assert len(deposits) == len(run)
    vectors: dict[int, str] = {}
    done: dict[Node, str] = {}
    for index, deposit in zip(run, deposits, strict=True):
        old = vectors.get(deposit.vector)
        vectors[deposit.vector] = f"({old}+{index})" if deposit.add else str(index)
        for target, source in deposit.merges:
            vectors[target] = f"({vectors[target]}+{vectors[source]})"
        if deposit.completes:
            done[deposit.completes] = vectors[nodes[deposit.completes]]
    assert list(done) == maximal_nodes(run.start, run.stop, M)
    for node, sum_made in done.items():
        wanted = tree_reduce(
            node, lambda n: str(n.lo) if n.hi - n.lo == 1 else None, lambda left, right: f"({left}+{right})"
        )
        assert sum_made == wanted
        assert vectors[nodes[node]] == wanted, "it stands until the step is committed"


@given(st.integers(1, 64))
def test_a_whole_run_needs_few_vectors(M: int) -> None:
    deposits, nodes = plan_deposits(range(M), M)
    used = {deposit.vector for deposit in deposits} | {v for d in deposits for pair in d.merges for v in pair}
    assert nodes == {Node(0, M): 0}
    assert len(used) <= max(1, (M - 1).bit_length())


def _sums(
    run: range, M: int, model: nn.Module | None = None, *, together: bool = False
) -> tuple[Replica, GradientSums]:
    torch.manual_seed(0)
    model = model or TinyNet()
    partition, _ = describe_model(model, OptimizerConfig(), ServerConfig(slice_bytes=512))
    replica = Replica(model, partition)
    return replica, GradientSums(replica, run, M, lambda: torch.zeros(partition.length), together=together)


def _backward(replica: Replica, microbatch: int) -> None:
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(microbatch))
    replica.model(images).square().sum().backward()


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("empty", [(), (1,), (0, 3)])
def test_the_bits_are_those_of_whole_vectors_added_along_the_tree(empty: tuple[int, ...], together: bool) -> None:
    M = 5
    replica, sums = _sums(range(M), M, together=together)
    replica.model.eval()  # no dropout: the same gradients twice
    leaves: list[Tensor] = []
    for index in range(M):
        leaf = torch.zeros(replica.partition.length)
        if index not in empty:
            _backward(replica, index)
            replica.take_gradients(leaf)
        leaves.append(leaf)
    for index in range(M):
        replica.reset_buffers()
        if index not in empty:
            sums.begin(index)
            _backward(replica, index)
        sums.end(index, 0 if index in empty else 2)
    wanted = tree_reduce(Node(0, M), lambda node: leaves[node.lo] if node.hi - node.lo == 1 else None, torch.add)
    assert torch.equal(sums.vectors[0].view(torch.int32), wanted.view(torch.int32))
    assert all(parameter.grad is None for parameter in replica.model.parameters())


def test_buffers_are_summed_by_samples() -> None:
    replica, sums = _sums(range(2), 2)
    changes = []
    for index, samples in enumerate((2, 3)):
        replica.reset_buffers()
        sums.begin(index)
        _backward(replica, index)
        change = torch.zeros(replica.partition.length)
        replica.take_buffer_changes(replica.buffer_part(change), samples)
        changes.append(replica.buffer_part(change))
        sums.end(index, samples)
    assert torch.equal(replica.buffer_part(sums.vectors[0]), changes[0] + changes[1])


def test_a_parameter_without_a_gradient_adds_zero() -> None:
    replica, sums = _sums(range(2), 2)
    for index in range(2):
        sums.begin(index)
        if index == 0:
            _backward(replica, index)
        else:
            replica.model.get_parameter("stem.bias").sum().backward()
        sums.end(index, 2)
    views = replica.partition.unflatten(sums.vectors[0])
    assert views["head.weight"].abs().sum() > 0


def test_a_gradient_that_comes_twice_is_refused_by_name() -> None:
    replica, sums = _sums(range(1), 1)
    sums.begin(0)
    replica.model.get_parameter("scale").square().backward()
    with pytest.raises(ConfigError, match=r"'scale' came twice .* use_reentrant=False"):
        replica.model.get_parameter("scale").square().backward()


def test_a_backward_outside_of_a_microbatch_is_left_alone() -> None:
    replica, _ = _sums(range(1), 1)
    _backward(replica, 0)
    assert replica.model.get_parameter("scale").grad is not None
