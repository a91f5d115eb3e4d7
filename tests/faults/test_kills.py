"""A worker or a server is killed at any stage of any step: the run ends with the bits of one that nobody disturbed."""

import json
import os
import signal
from pathlib import Path

import pytest

from paramserver.errors import WorkerLost
from tests.support.disturbed import SETTINGS, Undisturbed, disturbed, kill, ledger_of, lost_in, rows_of
from tests.support.processes import start
from tests.support.runs import SMALL, train
from workers.timing import PHASES

pytestmark = pytest.mark.usefixtures("ray_cluster")
STEPS = {"first": 1, "middle": 3, "last": 6}


@pytest.mark.parametrize(
    ("task", "stages"),
    [
        ("ssd", ("pull", "push", "update")),
        pytest.param("ssd", ("split", "compute", "commit"), marks=pytest.mark.slow),
        pytest.param("fcn", ("reduce", "aggregate"), marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_workers_killed_one_after_the_other(
    tmp_path: Path, undisturbed: Undisturbed, task: str, stages: tuple[str, ...]
) -> None:
    """All but one, in the first, a middle and the last step: what is left does it all, or has had replacements."""
    steps = [step for step, _ in zip(STEPS.values(), stages, strict=False)]
    faults = [kill("worker", 1 + i, step, stages[i]) for i, step in enumerate(steps)]
    run = disturbed(tmp_path, task, faults, workers=1 + len(stages))
    undisturbed.check(task, run)
    assert [number for role, number, _ in lost_in(run.folder) if role == "worker"] == [1 + i for i in range(len(steps))]


@pytest.mark.parametrize(
    ("task", "servers", "faults"),
    [
        ("ssd", 2, [("push", 2), ("commit", 6)]),
        pytest.param("ssd", 1, [("split", 1), ("compute", 4)], marks=pytest.mark.slow),
        pytest.param("ssd", 2, [("commit", 3), ("aggregate", 4)], marks=pytest.mark.slow),
        pytest.param("fcn", 2, [("update", 2), ("pull", 4)], marks=pytest.mark.slow),
    ],
)
def test_servers_killed(
    tmp_path: Path, undisturbed: Undisturbed, task: str, servers: int, faults: list[tuple[str, int]]
) -> None:
    run = disturbed(tmp_path, task, [kill("server", 0, step, stage) for stage, step in faults], servers=servers)
    undisturbed.check(task, run)
    assert [role for role, _, _ in lost_in(run.folder)] == ["server", "server"]


def test_a_worker_and_both_servers_killed_with_a_vote(tmp_path: Path) -> None:
    """With clipping a step is voted on; a server that is killed may have acted on the vote already, or not yet."""
    faults = [kill("server", 1, 2, "update"), kill("server", 0, 3, "commit"), kill("worker", 1, 5, "push")]
    single = train(tmp_path, "single", backend="single", **SMALL["ssd"], **SETTINGS, clip_grad_norm=0.5)
    run = disturbed(tmp_path, "ssd", faults, servers=2, clip_grad_norm=0.5)
    assert len(lost_in(run.folder)) == 3
    assert run.summary["state_fingerprint"] == single.summary["state_fingerprint"]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["ssd", "fcn"])
@pytest.mark.parametrize("role", ["worker", "server"])
@pytest.mark.parametrize("stage", PHASES)
def test_killed_at_a_stage_of_the_first_a_middle_and_the_last_step(
    tmp_path: Path, undisturbed: Undisturbed, task: str, role: str, stage: str
) -> None:
    """All three in one run: three of four workers, or the same server again and again."""
    numbers = [0, 1, 2] if role == "worker" else [0, 0, 0]
    faults = [kill(role, number, step, stage) for number, step in zip(numbers, STEPS.values(), strict=True)]
    run = disturbed(tmp_path, task, faults, workers=4 if role == "worker" else 2, servers=1 + (task == "ssd"))
    undisturbed.check(task, run)
    assert [(lost, number) for lost, number, _ in lost_in(run.folder)] == [(role, number) for number in numbers]


@pytest.mark.slow
def test_a_spare_takes_the_place_of_the_only_worker(tmp_path: Path) -> None:
    """From outside, once the spare stands by; nobody waits for a new process then."""
    settings = {**SMALL["ssd"], **SETTINGS, "batch_size": 5, "steps": 300}
    single = train(tmp_path, "single", backend="single", **settings)
    options = [f"--{name.replace('_', '-')}={str(value).lower()}" for name, value in settings.items() if name != "task"]
    folder, victim = tmp_path / "run", None
    with start("train", "ssd", "--backend=ps", "--workers=1", *options, f"--out={tmp_path}", "--name=run") as process:
        assert process.stdout is not None
        for line in process.stdout:
            rows = (
                json.loads((folder / "processes.json").read_text()) if line.startswith("step ") and not victim else []
            )
            if any(row["role"] == "spare-worker" for row in rows):
                victim = next(row["pid"] for row in rows if row["role"] == "worker")
                os.kill(victim, signal.SIGKILL)
    assert process.returncode == 0
    assert victim, "no spare has come before the end"
    assert [row["kind"] for row in rows_of(folder, "events.jsonl")] == ["lost", "replaced", "recovered"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["state_fingerprint"] == single.summary["state_fingerprint"]
    assert ledger_of(folder) == ledger_of(single.folder)


@pytest.mark.slow
def test_a_step_that_kills_whoever_computes_it_ends_the_run(tmp_path: Path, undisturbed: Undisturbed) -> None:
    """The committed version is saved first, so nothing is lost once the cause is gone."""
    with pytest.raises(WorkerLost, match="worker 0 died 4 times in step 3"):
        disturbed(tmp_path, "ssd", [kill("worker", 0, 3, "compute")] * 4, workers=1)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_2"]
    resumed = disturbed(tmp_path, "ssd", [], resume="auto")
    undisturbed.check("ssd", resumed)
