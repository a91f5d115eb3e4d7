"""DistributedDataParallel is held to the numbers of the other backends (E7)."""

from pathlib import Path
from typing import Any

import pytest
import torch

from launch.config import RunConfig
from launch.resolve import resolve
from tests.support.runs import HARD, SMALL, train
from tests.support.torchrun import run_ddp_cases
from workers.assembly import build_parts
from workers.checkpoint import load_checkpoint

GRID = [(microbatches, batch_size) for microbatches in (2, 4) for batch_size in (16, 15)]


def _grid(task: str) -> list[dict[str, Any]]:
    return [{**SMALL[task], **HARD, "microbatches": M, "batch_size": batch_size} for M, batch_size in GRID]


HARDEST: dict[str, Any] = {**SMALL["fcn"], **HARD}
"""Of fcn's grid, of which the rest is slow."""
EMPTY: dict[str, Any] = {**SMALL["ssd"], **HARD, "batch_size": 511, "microbatches": 2, "steps": 2}
"""The second minibatch has one sample: rank 1 has none, joins with zeros, and DDP waits for all."""


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param([*_grid("ssd"), HARDEST, EMPTY], id="all"),
        pytest.param(_grid("fcn"), id="fcn", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_give_the_bits_of_single(tmp_path: Path, cases: list[dict[str, Any]]) -> None:
    """Parameters and batch-norm buffers, with two and with four microbatches, equal and unequal."""
    found = run_ddp_cases(tmp_path, 2, cases)
    for index, (case, result) in enumerate(zip(cases, found, strict=True)):
        single = train(tmp_path, f"single{index}", backend="single", **case)
        assert result["fingerprint"] == single.summary["fingerprint"], case
        assert result["losses"][-1] == single.summary["loss"]["last"]


@pytest.mark.parametrize("task", ["ssd", pytest.param("fcn", marks=pytest.mark.slow)])
def test_three_ranks_take_the_same_step_from_the_same_state(tmp_path: Path, task: str) -> None:
    """The sum of three ranks has another order: each of six steps, from single's state, within 1e-5 of the update."""
    settings = {**SMALL[task], **HARD, "checkpoint_every": 1}
    single = train(tmp_path, "single", backend="single", **settings)
    checkpoints = single.folder / "checkpoints"
    steps = range(HARD["steps"])
    cases: list[dict[str, Any]] = [
        {**SMALL[task], **HARD, "save_to": str(tmp_path / f"after_{step}.pt")} for step in steps
    ]
    for step in steps[1:]:
        cases[step]["from_checkpoint"] = str(checkpoints / f"step_{step}")
    run_ddp_cases(tmp_path, 3, cases)
    run = resolve(RunConfig(backend="single", **SMALL[task], **HARD))
    states = [build_parts(run.task, run.worker, run.optimizer, run.servers).state.values]
    states += [load_checkpoint(checkpoints / f"step_{step + 1}")[0].values for step in steps]
    for step in steps:
        before, wanted = states[step], states[step + 1]
        found = torch.load(tmp_path / f"after_{step}.pt", weights_only=True)
        update = torch.cat([(wanted[name] - before[name]).flatten() for name in wanted]).double()
        error = torch.cat([(found[name] - wanted[name]).flatten() for name in wanted]).double()
        assert error.norm() <= 1e-5 * update.norm(), f"step {step + 1}: {error.norm() / update.norm()}"
