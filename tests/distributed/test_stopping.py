"""However a run ends, nothing is left behind, and what it wrote can be gone on from."""

import json
import os
import signal
from pathlib import Path

import pytest

from tests.support.processes import children, gone, ray_folders, shared_memory, start, wait_for, wait_for_line
from tests.support.runs import train

# A constant learning rate: it does not depend on where the run was to end.
SETTINGS = {
    "task": "ssd",
    "image_size": "64",
    "batch_size": 8,
    "microbatches": 2,
    "evaluate": False,
    "schedule": "constant",
    "warmup_steps": 0,
}
SMALL = [f"--{name.replace('_', '-')}={str(value).lower()}" for name, value in SETTINGS.items() if name != "task"]
BACKENDS = {"single": [], "ps": ["--workers", "2"], "ddp": ["--workers", "2"]}


@pytest.mark.parametrize(
    ("backend", "group"),
    [
        ("single", False),
        ("ps", True),
        ("ddp", False),
        pytest.param("single", True, marks=pytest.mark.slow),
        pytest.param("ps", False, marks=pytest.mark.slow),
    ],
)
def test_sigterm_writes_a_checkpoint_that_continues_to_the_same_bits(tmp_path: Path, backend: str, group: bool) -> None:
    """To the process, or to its whole group with all its children, as timeout(1) and many a scheduler send it."""
    folders, memory = ray_folders(), shared_memory()
    arguments = ["train", "ssd", "--backend", backend, *BACKENDS[backend], *SMALL, "--out", str(tmp_path)]
    arguments += ["--loader-processes", "1"] if group else []
    process = start(*arguments, "--steps", "500", "--name", "stopped")
    wait_for_line(process, "step 2/")
    os.killpg(process.pid, signal.SIGTERM) if group else process.send_signal(signal.SIGTERM)
    _, complaint = process.communicate(timeout=90)
    assert process.returncode == 143, complaint
    assert "Traceback" not in complaint
    assert gone(ray_folders() - folders) == []
    assert shared_memory() <= memory, "loader processes have named semaphores"
    folder = tmp_path / "stopped"
    assert json.loads((folder / "status.json").read_text())["state"] == "stopped"
    steps = json.loads((folder / "summary.json").read_text())["steps"]
    assert 2 <= steps < 500
    assert (folder / "checkpoints" / f"step_{steps}" / "meta.json").exists()
    settings = {**SETTINGS, "steps": steps + 1}
    resumed = train(tmp_path, "on", backend="single", resume=str(folder), **settings)
    whole = train(tmp_path, "whole", backend="single", **settings)
    assert resumed.summary["fingerprint"] == whole.summary["fingerprint"]


def test_sigterm_to_loader_processes_that_have_not_begun_ends_a_run_as_well(tmp_path: Path) -> None:
    arguments = ["train", "ssd", "--backend", "single", *SMALL, "--loader-processes", "2"]
    process = start(*arguments, "--steps", "500", "--out", str(tmp_path), "--name", "stopped")
    wait_for(lambda: any(b"multiprocessing.spawn" in command for command in children(process.pid)))
    os.killpg(process.pid, signal.SIGTERM)
    _, complaint = process.communicate(timeout=90)
    assert process.returncode == 143, complaint
    assert json.loads((tmp_path / "stopped" / "summary.json").read_text())["steps"] == 1


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    folders, memory = ray_folders(), shared_memory()
    process = start("train", "ssd", "--backend", "ps", "--workers=2", *SMALL, "--steps=500", f"--out={tmp_path}")
    wait_for_line(process, "step 1/")
    ours = ray_folders() - folders
    assert ours
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: every process of the group gets it
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130
    assert complaint.strip().splitlines() == ["pushpull: interrupted"]
    assert gone(ours) == []
    assert shared_memory() <= memory


def test_an_error_in_a_worker_leaves_nothing_behind(tmp_path: Path) -> None:
    folders, memory = ray_folders(), shared_memory()
    options = ["--lr=1e30", "--steps=50", f"--out={tmp_path}"]
    process = start("train", "ssd", "--backend", "ps", "--workers=2", *SMALL, *options)
    _, complaint = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "is not finite" in complaint
    assert gone(ray_folders() - folders) == []
    assert shared_memory() <= memory
