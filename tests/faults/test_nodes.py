"""Two nodes on one machine: what stands between them dies, or one of them does."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.disturbed import SETTINGS, Undisturbed, kill, ledger_of, losses_of, rows_of
from tests.support.heads import StartHead, ray_start, start_head
from tests.support.processes import start, wait_for_line
from tests.support.runs import SMALL
from workers.timing import PHASES

__all__ = ["start_head"]


_TRAIN_S = 200.0
"""Three losses of a node, each with processes that start anew, on cores that may have other work."""


def _train(
    tmp_path: Path,
    head: str,
    *more: str,
    task: str = "ssd",
    workers: int = 2,
    disturb: Callable[[Path], None] | None = None,
) -> Path:
    """A run on the cluster at ``head``; ``disturb`` is called with its folder after its second step."""
    settings: dict[str, Any] = {**SMALL[task], **SETTINGS}
    options = [f"--{name.replace('_', '-')}={str(value).lower()}" for name, value in settings.items() if name != "task"]
    options += ["--backend=ps", f"--workers={workers}", f"--address={head}", f"--out={tmp_path}", "--name=run", *more]
    with start("train", task, *options) as process:
        try:
            if disturb is not None:
                wait_for_line(process, "step 2/")
                disturb(tmp_path / "run")
            _, complaint = process.communicate(timeout=_TRAIN_S)
        finally:
            process.kill()  # one that hangs would be found by a later test
    assert process.returncode == 0, complaint
    return tmp_path / "run"


def _check(folder: Path, undisturbed: Undisturbed, task: str = "ssd") -> None:
    want = undisturbed.of(task)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["state_fingerprint"] == want.summary["state_fingerprint"]
    assert ledger_of(folder) == ledger_of(want.folder)
    assert losses_of(folder) == losses_of(want.folder)


def _kill_node_of_server(folder: Path) -> None:
    """The raylet of server 0's node, and whatever runs there."""
    rows = json.loads((folder / "processes.json").read_text())
    server = next(row for row in rows if row["role"] == "server")
    raylet = int(Path(f"/proc/{server['pid']}/stat").read_text().rpartition(")")[2].split()[1])
    for pid in (raylet, *(row["pid"] for row in rows if row["node"] == server["node"])):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "kind"),
    [("--replicas=1", "replaced"), ("--checkpoint-every=1", "restored")],
)
def test_a_server_that_is_lost_with_its_node_comes_back(
    start_head: StartHead, tmp_path: Path, undisturbed: Undisturbed, option: str, kind: str
) -> None:
    head = start_head(0)
    for _ in range(2):
        ray_start(f"--address={head}", "--num-cpus=3")
    folder = _train(tmp_path, head, option, disturb=_kill_node_of_server)
    _check(folder, undisturbed)
    assert kind in [row["kind"] for row in rows_of(folder, "events.jsonl")]


@pytest.mark.slow
def test_a_version_that_is_lost_before_it_was_saved_is_made_again(
    start_head: StartHead, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    """Nobody keeps the server's memory, and it dies right after the commit of a version that is to be saved."""
    head = start_head(0)
    ray_start(f"--address={head}", "--num-cpus=3")
    faults = tmp_path / "faults.yaml"
    faults.write_text(yaml.safe_dump([kill("server", 0, step, "pull") for step in (3, 5)]))
    folder = _train(tmp_path, head, f"--faults={faults}", "--checkpoint-every=2", "--spares=0")
    _check(folder, undisturbed)
    kinds = [row["kind"] for row in rows_of(folder, "events.jsonl")]
    assert [kind for kind in kinds if kind != "recovered"] == ["lost", "restored"] * 2


@pytest.mark.slow
def test_a_replica_that_dies_or_hangs_is_replaced(
    start_head: StartHead, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    head = start_head(0)
    for _ in range(2):
        ray_start(f"--address={head}", "--num-cpus=3")
    delay = {"delay": {"role": "worker", "index": 0, "step": 3, "stage": "compute", "seconds": 8.0}}
    # The first one is replaced while worker 0 is late.
    stop = {"stop": {"role": "replica", "index": 0, "step": 5, "stage": "push"}}
    faults = tmp_path / "faults.yaml"
    faults.write_text(yaml.safe_dump([kill("replica", 0, 2, "push"), delay, stop]))
    folder = _train(tmp_path, head, f"--faults={faults}", "--replicas=1", "--step-timeout=12")
    _check(folder, undisturbed)
    lost = [(row["role"], row["number"]) for row in rows_of(folder, "events.jsonl") if row["kind"] == "lost"]
    assert lost == [("replica", 0), ("replica", 0)]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pull", "push", "aggregate"])
@pytest.mark.parametrize("role", ["relay", "worker", "server"])
def test_what_is_killed_between_two_nodes(
    start_head: StartHead, tmp_path: Path, undisturbed: Undisturbed, role: str, stage: str
) -> None:
    head = start_head(2)
    ray_start(f"--address={head}", "--num-cpus=1")
    faults = tmp_path / "faults.yaml"
    faults.write_text(yaml.safe_dump([kill(role, 0, 3, stage)]))
    folder = _train(tmp_path, head, f"--faults={faults}")
    _check(folder, undisturbed)
    lost = [row["role"] for row in rows_of(folder, "events.jsonl") if row["kind"] == "lost"]
    assert lost == [role]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["ssd", "fcn"])
@pytest.mark.parametrize("stage", PHASES)
def test_worker_that_is_lost_with_its_node_in_the_first_a_middle_and_the_last_step(
    start_head: StartHead, tmp_path: Path, undisturbed: Undisturbed, task: str, stage: str
) -> None:
    """Three nodes in one run; a node has one process, so that it is a worker's alone."""
    head = start_head(0)
    for _ in range(5):
        ray_start(f"--address={head}", "--num-cpus=1")
    faults = tmp_path / "faults.yaml"
    faults.write_text(yaml.safe_dump([kill("node", 1 + i, step, stage) for i, step in enumerate((1, 3, 6))]))
    folder = _train(tmp_path, head, f"--faults={faults}", "--spares=0", task=task, workers=4)
    _check(folder, undisturbed, task)
    told = [row for row in rows_of(folder, "events.jsonl") if row["kind"] == "lost" and row["role"] == "worker"]
    # A replacement that Ray puts on a node whose end it has not seen yet never runs.
    assert [row["number"] for row in told if "pid" in row] == [1, 2, 3], told
