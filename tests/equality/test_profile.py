"""``--profile-steps``: a trace of each worker, with its stages by name."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from launch.config import RunConfig
from launch.resolve import resolve
from paramserver.errors import ConfigError
from tests.support.runs import SMALL, train

SETTINGS: dict[str, Any] = {**SMALL["ssd"], "batch_size": 4, "steps": 4, "evaluate": False}


def names_in(folder: Path, worker: int) -> list[str]:
    """What a worker's trace has recorded."""
    with gzip.open(folder / "profile" / f"worker-{worker}.json.gz", "rt", encoding="utf-8") as file:
        return [event.get("name", "") for event in json.load(file)["traceEvents"]]


def test_single_writes_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    folder = train(tmp_path, "run", backend="single", profile_steps="2-3", **SETTINGS).folder
    names = names_in(folder, 0)
    assert names.count("compute") == 2
    assert any("convolution" in name for name in names)
    assert [path.name for path in (folder / "profile").iterdir()] == ["worker-0.json.gz"]


def test_each_worker_writes_its_own_and_bits_stay_the_same(ray_cluster: None, tmp_path: Path) -> None:
    plain = train(tmp_path, "plain", backend="single", microbatches=2, **SETTINGS)
    result = train(tmp_path, "run", in_session=True, backend="ps", workers=2, profile_steps="3", **SETTINGS)
    for worker in (0, 1):
        names = names_in(result.folder, worker)
        assert names.count("aggregate") == 1
        assert {"pull", "compute", "push"} <= {*names}
    assert result.summary["fingerprint"] == plain.summary["fingerprint"]


def test_a_resumed_run_records_those_of_them_that_it_takes(tmp_path: Path) -> None:
    whole = train(tmp_path, "run", backend="single", checkpoint_every=2, **SETTINGS)
    more = {**SETTINGS, "resume": str(whole.folder / "checkpoints" / "step_2"), "profile_steps": "1-4"}
    resumed = train(tmp_path, "on", backend="single", **more)
    assert names_in(resumed.folder, 0).count("compute") == 2, "steps 3 and 4: 1 and 2 were taken by another run"


@pytest.mark.parametrize("steps", ["0", "3-2", "1-2-3", "last", "-1"])
def test_what_names_no_steps_is_refused(steps: str) -> None:
    with pytest.raises(ConfigError, match=r"--profile-steps .* is neither a step nor"):
        RunConfig(task="ssd", profile_steps=steps)


def test_steps_that_the_run_does_not_have_are_refused() -> None:
    with pytest.raises(ConfigError, match="--profile-steps 4-5: the run has 4 steps"):
        resolve(RunConfig(backend="single", profile_steps="4-5", **SETTINGS))


@pytest.mark.slow
def test_a_worker_that_is_interrupted_in_a_step_records_the_next_one(ray_cluster: None, tmp_path: Path) -> None:
    """Worker 1 is killed in a step that is recorded: the other one begins again, in the same process."""
    single = train(tmp_path, "single", backend="single", microbatches=2, **SETTINGS)
    faults = tmp_path / "faults.yaml"
    faults.write_text("- kill: {role: worker, index: 1, step: 2, stage: push}\n", encoding="utf-8")
    options: dict[str, Any] = {"workers": 2, "profile_steps": "2-3", "faults": str(faults), **SETTINGS}
    run = train(tmp_path, "run", in_session=True, backend="ps", **options)
    assert run.summary["fingerprint"] == single.summary["fingerprint"]
    assert "compute" in names_in(run.folder, 0)
