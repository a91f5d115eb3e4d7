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

__all__ = ["start_head"]

OPTIONS: dict[str, Any] = {**SMALL["ssd"], **SETTINGS}


def _train(tmp_path: Path, head: str, *more: str, disturb: Callable[[Path], None] | None = None) -> Path:
    """A run on the cluster at ``head``; ``disturb`` is called with its folder after its second step."""
    options = [f"--{name.replace('_', '-')}={str(value).lower()}" for name, value in OPTIONS.items() if name != "task"]
    options += ["--backend=ps", "--workers=2", f"--address={head}", f"--out={tmp_path}", "--name=run", *more]
    process = start("train", "ssd", *options)
    if disturb is not None:
        wait_for_line(process, "step 2/")
        disturb(tmp_path / "run")
    _, complaint = process.communicate(timeout=110)
    assert process.returncode == 0, complaint
    return tmp_path / "run"


def _check(folder: Path, undisturbed: Undisturbed) -> None:
    want = undisturbed.of("ssd")
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
@pytest.mark.parametrize("step", [1, 3, 6])
def test_a_worker_that_is_lost_with_its_node(
    start_head: StartHead, tmp_path: Path, undisturbed: Undisturbed, step: int
) -> None:
    """Whatever else was there is lost, too; the other node has room for what is needed."""
    head = start_head(0)
    for _ in range(2):
        ray_start(f"--address={head}", "--num-cpus=2")
    faults = tmp_path / "faults.yaml"
    faults.write_text(yaml.safe_dump([kill("node", 1, step, "compute")]))
    folder = _train(tmp_path, head, f"--faults={faults}", "--checkpoint-every=1")
    _check(folder, undisturbed)
