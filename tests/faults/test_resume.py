"""A run that was cut off goes on from its newest intact checkpoint, on any backend, to the bits of one that was not."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.config import RunConfig
from launch.train import RunResult, run
from paramserver.errors import CheckpointError
from tests.support.disturbed import SETTINGS, Undisturbed, disturbed, kill, ledger_of, losses_of
from tests.support.processes import gone, kill_now, ray_folders, shared_memory, start, wait_for_line
from tests.support.runs import SMALL, train
from workers.timing import PHASES

OPTIONS: dict[str, Any] = {**SMALL["ssd"], **SETTINGS}
FILES = ["model.safetensors", "trainer.pt", "meta.json"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A run with a checkpoint of each step."""
    return train(tmp_path_factory.mktemp("written"), "run", backend="single", checkpoint_every=1, **OPTIONS)


@pytest.mark.parametrize(
    ("backend", "step"),
    [
        *(("single", step) for step in (1, 2, 3, 4, 5)),
        ("ps", 3),
        *(pytest.param("ps", step, marks=pytest.mark.slow) for step in (1, 2, 4, 5)),
    ],
)
def test_every_checkpoint_leads_to_the_same_bits(
    tmp_path: Path, written: RunResult, undisturbed: Undisturbed, ray_cluster: None, backend: str, step: int
) -> None:
    resume = str(written.folder / "checkpoints" / f"step_{step}")
    if backend == "ps":
        result = disturbed(tmp_path, "ssd", [], resume=resume, servers=2)
    else:
        result = train(tmp_path, "run", backend="single", resume=resume, **OPTIONS)
    undisturbed.check("ssd", result)


@pytest.mark.parametrize("harm", ["truncated", "a flipped bit", "deleted"])
@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_that_is_not_whole_is_named_and_the_one_before_taken(
    tmp_path: Path,
    written: RunResult,
    undisturbed: Undisturbed,
    capsys: pytest.CaptureFixture[str],
    name: str,
    harm: str,
) -> None:
    shutil.copytree(written.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_6")
    newest = tmp_path / "run" / "checkpoints" / "step_5"
    spoil(newest / name, harm)
    with pytest.raises(CheckpointError, match="step_5"):
        train(tmp_path, "other", backend="single", resume=str(newest), **OPTIONS)
    resumed = run(RunConfig(backend="single", resume="auto", out=str(tmp_path), name="run", **OPTIONS))
    undisturbed.check("ssd", resumed)
    said = capsys.readouterr().out
    assert f"checkpoint {newest}" in said
    assert "the one before it is taken" in said
    assert "step 5/6" in said, "from step 4 on"


def spoil(path: Path, harm: str) -> None:
    """Do to a file what disks and crashes do."""
    data = bytearray(path.read_bytes())
    if harm == "deleted":
        path.unlink()
    elif harm == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 0x10
        path.write_bytes(data)


def test_auto_begins_where_there_is_nothing_to_go_on_from(tmp_path: Path, undisturbed: Undisturbed) -> None:
    undisturbed.check("ssd", train(tmp_path, "run", backend="single", resume="auto", **OPTIONS))


def test_the_last_and_the_best_checkpoints_are_kept(tmp_path: Path) -> None:
    settings = {**OPTIONS, "evaluate": True, "eval_every": 1}
    folder = train(tmp_path, "run", backend="single", checkpoint_every=1, keep_checkpoints=2, **settings).folder
    best = json.loads((folder / "checkpoints" / "best.json").read_text())
    rows = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert best["metric"] == "ap50"
    assert best["value"] == max(row["ap50"] for row in rows)
    kept = {path.name for path in (folder / "checkpoints").glob("step_*")}
    assert kept == {"step_5", "step_6", f"step_{best['step']}"}


def test_a_driver_that_is_killed_leaves_a_run_that_goes_on(tmp_path: Path, undisturbed: Undisturbed) -> None:
    folders, memory = ray_folders(), shared_memory()
    options = [f"--{name.replace('_', '-')}={str(value).lower()}" for name, value in OPTIONS.items() if name != "task"]
    command = ["train", "ssd", "--backend=ps", "--workers=2", "--checkpoint-every=2", *options]
    command += [f"--out={tmp_path}", "--name=run", "--resume=auto"]
    process = start(*command)
    wait_for_line(process, "step 3/")
    kill_now(process)
    process = start(*command)
    _, complaint = process.communicate(timeout=90)
    assert process.returncode == 0, complaint
    want, folder = undisturbed.of("ssd"), tmp_path / "run"
    assert json.loads((folder / "summary.json").read_text())["fingerprint"] == want.summary["fingerprint"]
    assert ledger_of(folder) == ledger_of(want.folder)
    assert losses_of(folder) == losses_of(want.folder)
    assert gone(ray_folders() - folders) == []
    assert shared_memory() <= memory
    assert not [name for name in os.listdir(folder / "checkpoints") if name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["ssd", "fcn"])
@pytest.mark.parametrize("stage", PHASES)
def test_a_driver_killed_in_the_first_a_middle_and_the_last_step(
    tmp_path: Path, undisturbed: Undisturbed, task: str, stage: str
) -> None:
    """Thrice in one run, which is started again each time."""
    folders, faults = ray_folders(), tmp_path / "faults.yaml"
    faults.write_text(yaml.safe_dump([kill("driver", 0, step, stage) for step in (1, 3, 6)]))
    settings = {**SMALL[task], **SETTINGS, "checkpoint_every": 1, "workers": 2, "faults": faults, "out": tmp_path}
    options = [f"--{name.replace('_', '-')}={str(value).lower()}" for name, value in settings.items() if name != "task"]
    ended = []
    while len(ended) < 4 and 0 not in ended:
        with start("train", task, "--backend=ps", "--name=run", "--resume=auto", "--spares=0", *options) as process:
            ended.append(process.wait(timeout=90))
    assert ended == [-9, -9, -9, 0]
    want, folder = undisturbed.of(task), tmp_path / "run"
    assert json.loads((folder / "summary.json").read_text())["state_fingerprint"] == want.summary["state_fingerprint"]
    assert ledger_of(folder) == ledger_of(want.folder)
    assert losses_of(folder) == losses_of(want.folder)
    assert gone(ray_folders() - folders) == []


@pytest.mark.slow
def test_ranks_that_torchrun_starts_again_find_each_other_and_end_with_the_same_bits(tmp_path: Path) -> None:
    """As ``bench kill`` does it, beside ``ps``."""
    process = start("bench", "kill", "--image-size=64", "--json", cwd=tmp_path)
    printed, complaint = process.communicate(timeout=300)
    assert process.returncode == 0, complaint
    found = json.loads(printed)
    assert found["ps"]["bits_equal"]
    assert found["ddp"]["bits_equal"]
    assert found["ps"]["committed_steps_computed_again"] == 0
