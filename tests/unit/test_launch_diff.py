"""``pushpull diff`` finds the first step at which two runs differ."""

import json
from pathlib import Path

import pytest

from launch.cli import main
from launch.config import RunConfig
from launch.train import run

SETTINGS = {"task": "ssd", "backend": "single", "image_size": "64", "batch_size": 4, "steps": 4, "evaluate": False}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two equal runs, and one that goes another way."""
    out = tmp_path_factory.mktemp("runs")
    for name, lr in (("a", 0.1), ("b", 0.1), ("c", 0.2)):
        run(RunConfig(out=str(out), name=name, lr=lr, fingerprint_every=1, warmup_steps=0, **SETTINGS), quiet=True)
    return out


def test_equal_runs_are_equal(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(runs / "a"), str(runs / "b")]) == 0
    said = capsys.readouterr().out
    assert "fingerprint equal in all 3 steps that both have" in said
    assert "loss        equal in all 4 steps" in said
    assert "end         equal" in said
    assert "setting" not in said


def test_the_first_step_that_differs_is_named(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(runs / "a"), str(runs / "c")]) == 1
    said = capsys.readouterr().out
    assert "setting     lr: 0.1 and 0.2" in said
    assert "fingerprint differs first in step 1" in said
    assert "loss        differs first in step 2" in said, "the loss of step 1 is that of the same weights"
    assert "samples     equal in all 4 steps" in said
    assert "end         different" in said


def test_a_step_that_was_recorded_wrongly_is_found(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.yaml", "metrics.jsonl", "ledger.jsonl"):
        (other / name).write_bytes((runs / "a" / name).read_bytes())
    rows = [json.loads(line) for line in (other / "ledger.jsonl").read_text().splitlines()]
    rows[2]["microbatches"][0]["samples"][0] += 1
    (other / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["diff", str(runs / "a"), str(other)]) == 1
    assert "samples     differs first in step 3" in capsys.readouterr().out


def test_what_is_no_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(tmp_path), str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
