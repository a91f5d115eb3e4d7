"""16 bits on the wire: near fp32 in the loss, equal to itself after a resume, and never more than that is claimed."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from launch.config import RunConfig
from launch.train import RunResult, run
from tests.support.runs import HARD, SMALL, train

SETTINGS: dict[str, Any] = {**SMALL["ssd"], **HARD, "workers": 2, "transport": "ray", "wire_precision": "bf16"}
"""Two workers of two microbatches each: tree nodes [0, 2) and [2, 4)."""
SINGLE: dict[str, Any] = {"backend": "single", "workers": 1, "wire_precision": "fp32"}


@pytest.fixture(scope="module")
def whole(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A run that nobody disturbs, with a checkpoint after its third step."""
    return train(tmp_path_factory.mktemp("bf16"), "whole", in_session=True, servers=2, checkpoint_every=3, **SETTINGS)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """The same in fp32, which any number of workers computes."""
    return train(tmp_path_factory.mktemp("fp32"), "exact", **{**SETTINGS, **SINGLE})


def _losses(result: RunResult) -> list[float]:
    return [json.loads(line)["loss"] for line in (result.folder / "metrics.jsonl").read_text().splitlines()]


def _go_on(whole: RunResult, out: Path, **changes: Any) -> RunResult:
    resume = str(whole.folder / "checkpoints" / "step_3")
    return run(RunConfig(out=str(out), name="on", resume=resume, **{**SETTINGS, **changes}), in_session=True)


def test_it_stays_near_fp32_in_the_loss(whole: RunResult, exact: RunResult) -> None:
    assert (whole.summary["wire_precision"], exact.summary["wire_precision"]) == ("bf16", "fp32")
    assert _losses(whole) == pytest.approx(_losses(exact), rel=0.02)
    assert _losses(whole) != _losses(exact)


def test_a_checkpoint_has_residuals_where_something_was_rounded(whole: RunResult, exact: RunResult) -> None:
    for step in (3, 6):
        checkpoint = whole.folder / "checkpoints" / f"step_{step}"
        assert json.loads((checkpoint / "meta.json").read_text())["wire_precision"] == "bf16"
        residuals = safetensors.torch.load_file(checkpoint / "residuals.safetensors")
        model = safetensors.torch.load_file(checkpoint / "model.safetensors")
        assert {name.partition("/")[0] for name in residuals} == {"0-2", "2-4"}
        assert all(value.shape == model[name.partition("/")[2]].shape for name, value in residuals.items())
        assert all(value.any() for name, value in residuals.items() if "blocks" in name and name.endswith("weight"))
        assert not any("running" in name for name in residuals)
    assert not (exact.folder / "checkpoints" / "step_6" / "residuals.safetensors").exists()


def test_a_resumed_run_equals_the_one_that_never_stopped(
    whole: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With another number of servers and other slices, too."""
    resumed = _go_on(whole, tmp_path, servers=1, slice_bytes=65536)
    shown = capsys.readouterr().out
    assert "wire      bf16 with error feedback" in shown
    assert "that N workers equal one, or a killed run one that nobody killed, is not claimed" in shown
    assert "dropped" not in shown
    assert resumed.summary["state_fingerprint"] == whole.summary["state_fingerprint"]
    one, other = (
        safetensors.torch.load_file(result.folder / "checkpoints" / "step_6" / "residuals.safetensors")
        for result in (resumed, whole)
    )
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)


BOTH = "residuals of sums over [0, 2), [2, 4) are dropped: in this run nobody sends"
DROPPED: list[Any] = [
    pytest.param({"workers": 1}, BOTH, id="one worker"),
    pytest.param(SINGLE, "it has --wire-precision bf16, this run has fp32", id="single"),
    pytest.param(
        {"wire_precision": "fp16"},
        "it has --wire-precision bf16, this run has fp16",
        id="fp16",
        marks=pytest.mark.slow,
    ),
    # Two of three workers send what nobody sent before.
    pytest.param({"workers": 3}, "residuals of sums over [2, 4) are", id="three workers", marks=pytest.mark.slow),
    pytest.param({"transport": "auto"}, BOTH, id="no wire", marks=pytest.mark.slow),
    pytest.param({"wire_precision": "fp32"}, "this run has fp32", id="ps in fp32", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("changes", "notice"), DROPPED)
def test_residuals_that_fit_no_more_are_dropped_with_a_notice(
    whole: RunResult,
    exact: RunResult,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    notice: str,
) -> None:
    result = _go_on(whole, tmp_path, **changes)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("note      residuals"))
    assert notice in line
    assert _losses(result) == pytest.approx(_losses(exact), rel=0.02)
