"""``pushpull bench kill``: what the death of one worker costs under the parameter server and under DDP."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.environment import environment
from launch.kill_config import KillConfig
from launch.run_folder import read_json
from paramserver.errors import CheckpointError, StepTimeout, WorkerLost

__all__ = ["bench_kill"]

_LOOK_S = 0.005
_DEADLINE_S = 600.0
_MORE = {"ps": [], "ddp": ["--max-restarts=1"]}


def bench_kill(config: KillConfig) -> int:
    """Measure and print; gives the exit code.

    Raises:
        WorkerLost: if a run did not survive.
        StepTimeout: if one did not get on.
    """
    with tempfile.TemporaryDirectory(prefix="pushpull-kill-") as folder:
        rows = {backend: _measure(config, backend, Path(folder)) for backend in _MORE}
    result = {"task": config.task, "workers": config.workers, "killed_after_step": config.step, **rows}
    if config.json:
        print(json.dumps({**result, "environment": environment()}, indent=2))
    else:
        _print_table(config, rows)
    return 0


def _measure(config: KillConfig, backend: str, out: Path) -> dict[str, Any]:
    _run(config, backend, out, "undisturbed")
    killed_at, lowest, back_at = _run(config, backend, out, "killed", kill=True)
    ends = [read_json(out / f"{backend}-{name}" / "summary.json") for name in ("undisturbed", "killed")]
    return {
        "seconds_until_the_next_step": back_at - killed_at,
        "step_ms": ends[0]["step_ms"]["median"],
        "committed_steps_computed_again": config.step - lowest,
        "samples_computed_again": (config.step - lowest) * config.batch_size,
        "bits_equal": ends[0]["state_fingerprint"] == ends[1]["state_fingerprint"],
    }


def _run(config: KillConfig, backend: str, out: Path, name: str, *, kill: bool = False) -> tuple[float, int, float]:
    """Train; if somebody is to be killed, give when that was, how far the run went back, and when it got further."""
    script = Path(sys.executable).with_name("pushpull")
    command = [str(script), "train", config.task, f"--backend={backend}", f"--workers={config.workers}"]
    command += [f"--steps={config.steps}", f"--batch-size={config.batch_size}", "--evaluate=false"]
    command += [
        f"--checkpoint-every={config.checkpoint_every}",
        f"--out={out}",
        f"--name={backend}-{name}",
        *_MORE[backend],
    ]
    command += [] if config.image_size is None else [f"--image-size={config.image_size}"]
    folder = out / f"{backend}-{name}"
    with (out / "log").open("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            found = _kill(config, folder, process) if kill else (0.0, 0, 0.0)
            process.wait(_DEADLINE_S)
        except subprocess.TimeoutExpired:
            raise StepTimeout(f"{backend} did not end within {_DEADLINE_S:.0f} s after a worker was killed") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
        if process.returncode:
            log.seek(0)
            tail = " | ".join(line.strip() for line in log.read().splitlines()[-2:])
            raise WorkerLost(f"{backend} did not survive: {tail}")
    return found


def _kill(config: KillConfig, folder: Path, process: "subprocess.Popen[bytes]") -> tuple[float, int, float]:
    _wait_for(lambda: _step(folder) >= config.step, process)
    rows = read_json(folder / "processes.json")
    os.kill(next(row["pid"] for row in rows if row["role"] == "worker" and row["index"] == 1), signal.SIGKILL)
    killed_at, reached = time.monotonic(), _step(folder)
    lowest = reached
    deadline = killed_at + _DEADLINE_S
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(_LOOK_S)
        step = _step(folder)
        lowest = min(lowest, step)
        if step > reached:
            return killed_at, lowest, time.monotonic()
    raise StepTimeout(f"the run did not get beyond step {reached} after a worker was killed")


def _wait_for(condition: Any, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + _DEADLINE_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise StepTimeout("the run did not reach the step after which a worker is to be killed")
        time.sleep(_LOOK_S)


def _step(folder: Path) -> int:
    """The last step that a run has written down."""
    try:
        lines = (folder / "metrics.jsonl").read_bytes().splitlines()
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (OSError, ValueError, CheckpointError):
        return 0


def _print_table(config: KillConfig, rows: dict[str, dict[str, Any]]) -> None:
    table = Table(title=f"{config.task}, {config.workers} workers: one is killed after step {config.step}")
    for column in ("", "until the next step", "of which a step", "steps again", "samples again", "bits equal"):
        table.add_column(column, justify="left" if not column else "right")
    for backend, row in rows.items():
        table.add_row(
            backend,
            f"{row['seconds_until_the_next_step']:.2f} s",
            f"{1e-3 * row['step_ms']:.2f} s",
            str(row["committed_steps_computed_again"]),
            str(row["samples_computed_again"]),
            "yes" if row["bits_equal"] else "no",
        )
    Console().print(table)
