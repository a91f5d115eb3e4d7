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


@pytest.mark.parametrize("task", ["ssd", pytest.param("fcn", marks=pytest.mark.slow)])
def test_two_ranks_give_the_bits_of_single(tmp_path: Path, task: str) -> None:
    """Parameters and batch-norm buffers, with two and with four microbatches, equal and unequal."""
    cases = [
        {**SMALL[task], **HARD, "microbatches": microbatches, "batch_size": batch_size}
        for microbatches, batch_size in GRID
    ]
    found = run_ddp_cases(tmp_path, 2, cases)
    for index, (case, result) in enumerate(zip(cases, found, strict=True)):
        single = train(tmp_path, f"single{index}", backend="single", **case)
        assert result["fingerprint"] == single.summary["fingerprint"], case
        assert result["losses"][-1] == single.summary["loss"]["last"]


def test_two_ranks_give_the_bits_of_single_for_fcn(tmp_path: Path) -> None:
    """The hardest case of the grid above; the rest of it is slow."""
    case = {**SMALL["fcn"], **HARD}
    (result,) = run_ddp_cases(tmp_path, 2, [case])
    assert result["fingerprint"] == train(tmp_path, "single", backend="single", **case).summary["fingerprint"]


def test_a_rank_without_samples_joins_with_zeros(tmp_path: Path) -> None:
    """The second minibatch has one sample: rank 1 has none, and DDP waits for all."""
    case = {**SMALL["ssd"], **HARD, "batch_size": 511, "microbatches": 2, "steps": 2}
    (result,) = run_ddp_cases(tmp_path, 2, [case])
    single = train(tmp_path, "single", backend="single", **case)
    assert result["fingerprint"] == single.summary["fingerprint"]


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
