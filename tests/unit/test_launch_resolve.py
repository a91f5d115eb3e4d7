"""How gaps are filled, and that a run's config.yaml repeats the run."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from launch.cli import main
from launch.config import RunConfig
from launch.resolve import resolve
from paramserver.errors import ConfigError
from tests.support.runs import SMALL

SSD = {**SMALL["ssd"], "device": "cpu"}


def test_recipe_fills_what_is_not_said() -> None:
    default = resolve(RunConfig(task="ssd", device="cpu")).config
    assert (default.batch_size, default.lr, default.momentum, default.schedule) == (32, 0.05, 0.9, "cosine")
    assert default.steps == 20 * 16, "20 epochs of 512 images"
    d2l = resolve(RunConfig(task="ssd", recipe="d2l", device="cpu", weight_decay=0.0, steps=3)).config
    assert (d2l.lr, d2l.momentum, d2l.weight_decay, d2l.steps) == (0.2, 0.0, 0.0, 3)


@pytest.mark.parametrize(("workers", "microbatches"), [(None, 1), (1, 1), (2, 2), (3, 4), (4, 4), (5, 8)])
def test_microbatches_are_workers_rounded_up_to_a_power_of_two(workers: int | None, microbatches: int) -> None:
    assert resolve(RunConfig(backend="ps", workers=workers, **SSD)).config.microbatches == microbatches


def test_paths_are_made_absolute_for_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = Path(__file__).resolve().parents[2] / "examples" / "count_task.py"
    shutil.copy(example, tmp_path)
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    run = resolve(RunConfig(task="count_task.py:CountTask", data="voc:images", device="cpu", steps=1))
    assert run.config.task == f"{tmp_path}/count_task.py:CountTask"
    assert run.options.data == run.config.data == f"voc:{tmp_path}/images"


def test_task_that_does_not_fit_is_a_matter_of_usage() -> None:
    with pytest.raises(ConfigError, match="unknown task 'yolo'"):
        resolve(RunConfig(task="yolo"))
    with pytest.raises(ConfigError, match="ssd has no recipe 'fast': use one of default, d2l"):
        resolve(RunConfig(recipe="fast", **SSD))


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "ssd", "--workers", "3", "--device", "cpu", "--out", str(tmp_path / "runs"), "--dry-run"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "M = 4 microbatches (" in shown
    assert "CPU core (simulated: it stands in for a GPU)" in shown
    assert "dry run: nothing is written or started" in shown
    assert list(tmp_path.iterdir()) == []


def test_config_of_a_run_repeats_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = ["train", "ssd", "--backend", "single", "--device", "cpu", "--image-size", "64", "--batch-size", "5"]
    first += ["--steps", "2", "--microbatches", "2", "--lr-factors", "class_heads.*=2", "--freeze", "blocks.0.*"]
    assert main([*first, "--evaluate", "false", "--out", str(tmp_path), "--name", "first"]) == 0
    assert main(["train", "--config", str(tmp_path / "first" / "config.yaml"), "--name", "again"]) == 0

    def content(name: str, file: str) -> dict[str, object]:
        return yaml.safe_load((tmp_path / name / file).read_text())  # type: ignore[no-any-return]

    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("first", "again")]
    assert summaries[0]["fingerprint"] == summaries[1]["fingerprint"]
    assert summaries[0]["state_fingerprint"] == summaries[1]["state_fingerprint"]
    assert {**content("first", "config.yaml"), "name": "again"} == content("again", "config.yaml")


def test_compiling_without_a_compiler_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"--compile needs a C\+\+ compiler"):
        resolve(RunConfig(task="ssd", device="cpu", compile=True))
