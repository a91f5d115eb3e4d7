"""Workers push known integers through real servers: the parameters after k steps are known exactly.

Worker r pushes r + 1 (times M, so that the division by the total weight is exact); learning rate and momentum are
powers of two, so that every number on the way is exact in fp32 and nothing needs a tolerance.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from paramserver.client import Client
from paramserver.config import OptimizerConfig
from paramserver.reduction import maximal_nodes
from tests.support.servers import Fleet, rows_of
from workers.minibatch import deal_runs

LR = 0.25
STEPS = 4
# Slices have 64 elements: smaller, just as large, and larger, with and without a rest.
SHAPES = {"scalar": (), "small": (5,), "slice": (64,), "exact": (2, 64), "large": (7, 43)}


def _start() -> dict[str, Tensor]:
    return {name: torch.arange(torch.Size(shape).numel()).float().reshape(shape) % 8 for name, shape in SHAPES.items()}


def _pattern(shape: tuple[int, ...]) -> Tensor:
    """Another integer at neighbouring elements, so that a mix-up of places would show."""
    return torch.arange(torch.Size(shape).numel()).float().reshape(shape) % 3 + 1


def _train(fleet: Fleet, worker: int, num_workers: int) -> None:
    client = fleet.client(worker)
    M = fleet.num_microbatches
    run = deal_runs(M, num_workers)[worker]
    pulled = torch.empty(fleet.partition.length)
    for step in range(STEPS):
        client.pull(step, pulled)
        _push(fleet, client, worker, step, run)
        client.wait(step + 1)


def _push(fleet: Fleet, client: Client, worker: int, step: int, run: range) -> None:
    M = fleet.num_microbatches
    for node in maximal_nodes(run.start, run.stop, M):
        size = node.hi - node.lo
        sums = {name: size * M * (worker + 1) * _pattern(shape) for name, shape in SHAPES.items()}
        client.push(step, node, fleet.flatten(sums), rows_of(node), {})


def _train_in_threads(fleet: Fleet, num_workers: int) -> None:
    with ThreadPoolExecutor(num_workers) as pool:
        for result in [pool.submit(_train, fleet, worker, num_workers) for worker in range(num_workers)]:
            result.result()


def _train_in_turn(fleet: Fleet, num_workers: int) -> None:
    clients = [fleet.client(worker) for worker in range(num_workers)]
    runs = deal_runs(fleet.num_microbatches, num_workers)
    for step in range(STEPS):
        for worker in reversed(range(num_workers)):
            _push(fleet, clients[worker], worker, step, runs[worker])
        for client in clients:
            assert client.wait(step + 1).version == step + 1


def _expected(num_workers: int, num_microbatches: int, momentum: float) -> dict[str, Tensor]:
    runs = deal_runs(num_microbatches, num_workers)
    mean = sum((worker + 1) * len(run) for worker, run in enumerate(runs))  # sum of sums / M, exactly
    moved = velocity = 0.0
    for _ in range(STEPS):
        velocity = momentum * velocity + mean
        moved += LR * velocity
    return {name: start - moved * _pattern(SHAPES[name]) for name, start in _start().items()}


@pytest.mark.parametrize("train", [_train_in_threads, _train_in_turn])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("num_servers", [1, 2, 3])
@pytest.mark.parametrize(
    ("num_workers", "num_microbatches"),
    [(1, 1), (1, 3), (2, 2), (2, 3), (2, 4), (3, 4), (3, 5), (4, 4), (4, 7), (4, 8)],
)
def test_parameters_after_k_steps_are_exactly_what_arithmetic_says(
    num_workers: int, num_microbatches: int, num_servers: int, momentum: float, train: Callable[[Fleet, int], None]
) -> None:
    config = OptimizerConfig(lr=LR, momentum=momentum)
    fleet = Fleet(_start(), config, num_microbatches=num_microbatches, num_servers=num_servers)
    train(fleet, num_workers)
    state = fleet.state()
    assert state.version == STEPS
    for name, value in _expected(num_workers, num_microbatches, momentum).items():
        assert torch.equal(state.values[name], value), name


def test_unequal_weights_divide_the_sum_of_sums_once() -> None:
    """(4 x 1 + 12 x 1) / (1 + 7) = 2, where a mean of the workers' means would give (4 / 1 + 12 / 7) / 2."""
    fleet = Fleet({"w": torch.zeros(3)}, OptimizerConfig(lr=1.0), num_microbatches=2)
    client = fleet.client()
    for node, total, weight in zip(maximal_nodes(0, 1, 2) + maximal_nodes(1, 2, 2), (4.0, 12.0), (1, 7), strict=True):
        client.push(0, node, fleet.flatten({"w": torch.full((3,), total)}), rows_of(node, weight=weight), {})
    client.wait(1)
    assert torch.equal(fleet.state().values["w"], torch.full((3,), -2.0))
