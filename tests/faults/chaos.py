"""Random kills from outside, at random times: ``make chaos SEED=1``.

Each run has 2 to 4 workers and 1 or 2 servers; ``kill -9`` takes a worker, a server or the driver, which is started
again with ``--resume auto``. Every run must end with the bits and the samples of one that nobody disturbed.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.disturbed import ledger_of, rows_of
from tests.support.processes import PUSHPULL, gone, ray_folders, shared_memory

HANG_S = 300.0
SLOW_S = {"worker": 2.0, "server": 5.0}
"""A recovery that takes longer is told event by event."""
SETTINGS: dict[str, dict[str, Any]] = {
    "ssd": {"image_size": "64", "steps": 500, "slice_bytes": 1 << 14},
    "fcn": {"image_size": "48x64", "steps": 250},
}
COMMON = {"batch_size": 13, "microbatches": 4, "seed": 3, "checkpoint_every": 20, "evaluate": False, "momentum": 0.9}


@dataclass
class Tally:
    """What came of all runs."""

    equal: int = 0
    runs: int = 0
    hangs: int = 0
    samples_wrong: int = 0
    left_behind: int = 0
    kills: dict[str, int] = field(default_factory=dict)
    recovery_s: dict[str, list[float]] = field(default_factory=dict)
    """From each kill to the commit of the next step."""


def _command(task: str, out: Path, name: str, *more: str) -> list[str]:
    settings = {**COMMON, **SETTINGS[task]}
    options = [f"--{key.replace('_', '-')}={str(value).lower()}" for key, value in settings.items()]
    return [PUSHPULL, "train", task, *options, f"--out={out}", f"--name={name}", *more]


def _start(command: list[str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def _step(folder: Path) -> int:
    """How many steps a run has written down."""
    try:
        return (folder / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def _victims(folder: Path, role: str) -> list[int]:
    try:
        rows = json.loads((folder / "processes.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [row["pid"] for row in rows if row["role"] == role]


def _disturb(
    dice: random.Random, task: str, out: Path, name: str, kills: int, pause_s: float, tally: Tally, given: list[str]
) -> None:
    """One run, with the options given, and with so many kills, each up to ``pause_s`` after the one before it."""
    workers, servers = dice.randint(2, 4), dice.randint(1, 2)
    more = ["--backend=ps", f"--workers={workers}", f"--servers={servers}", "--resume=auto", *given]
    command, folder = _command(task, out, name, *more), out / name
    process = _start(command)
    deadline, done = time.monotonic() + HANG_S, []
    next_kill, begun_at = None, 0
    starting: set[float] = set()
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
        if next_kill is None and _step(folder) and len(done) < kills:
            next_kill = time.monotonic() + dice.uniform(0.0, pause_s)
        if next_kill is None or time.monotonic() < next_kill:
            continue
        role = dice.choices(["worker", "server", "driver"], [10, 6, 1])[0]
        victims = _victims(folder, role)
        if not victims:
            continue
        next_kill = None
        try:
            os.kill(dice.choice(victims), signal.SIGKILL)
        except ProcessLookupError:
            continue  # the run was just ending
        done.append((role, time.time()))
        if _step(folder) <= begun_at:
            starting.add(done[-1][1])
        if role == "driver":
            process.wait()
            begun_at = _step(folder)
            process = _start(command)
            deadline = time.monotonic() + HANG_S
    tally.runs += 1
    if process.poll() is None:
        tally.hangs += 1
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    recovered = [row["time"] for row in rows_of(folder, "events.jsonl") if row["kind"] == "recovered"]
    for role, at in done:
        tally.kills[role] = tally.kills.get(role, 0) + 1
        after = [when for when in recovered if when > at]
        if role != "driver" and after:
            cut_off = any(kind == "driver" and at < other < after[0] for kind, other in done)
            if cut_off:  # the run that would have recovered is gone, and the next one has nothing to recover from
                continue
            together = any(at != other and _overlap(at, other, after[0], recovered) for _, other in done)
            if after[0] - at > SLOW_S[role]:
                _tell(folder, at, after[0], f"{role} killed")
            when = ", while another loss was open" if together else ", before a first step" if at in starting else ""
            tally.recovery_s.setdefault(role + when, []).append(after[0] - at)


def _tell(folder: Path, begin: float, end: float, what: str) -> None:
    print(f"  {what}, {end - begin:.1f} s until the next commit:")
    for row in rows_of(folder, "events.jsonl"):
        if begin - 1 < row["time"] <= end:
            print(f"    {row['time'] - begin:6.2f} s  {row['text']}")


def _overlap(at: float, other: float, until: float, recovered: list[float]) -> bool:
    """Whether another kill came before this one was recovered from, or this one before the other one was."""
    return at < other < until or (other < at and not any(other < when < at for when in recovered))


def _judge(out: Path, task: str, name: str, tally: Tally) -> str:
    """Compare a run with the undisturbed one; gives a word on it."""
    try:
        ends = [json.loads((out / run / "summary.json").read_text())["state_fingerprint"] for run in (task, name)]
    except OSError:
        status = (out / name / "status.json").read_text(encoding="utf-8")
        return f"did not end: {json.loads(status)['error']}"
    same = ends[0] == ends[1]
    tally.equal += same
    samples = ledger_of(out / task) == ledger_of(out / name)
    tally.samples_wrong += not samples
    return f"{'equal' if same else 'DIFFERENT'}, samples {'as planned' if samples else 'WRONG'}"


def main() -> int:
    """Disturb runs until there are enough of them and of kills; print the table; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--pause", type=float, default=8.0, help="seconds between two kills at most")
    parser.add_argument("--task", choices=SETTINGS, help="of all runs; otherwise every fifth is of fcn")
    parser.add_argument("given", nargs="*", metavar="-- --overlap=true", help="options for the runs that are disturbed")
    options = parser.parse_args()
    tally, memory = Tally(), shared_memory()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        out = Path(folder)
        for task in SETTINGS:
            subprocess.run(_command(task, out, task, "--backend=single"), check=True, stdout=subprocess.DEVNULL)
        each = -(-options.kills // options.runs)
        while tally.runs < options.runs or (sum(tally.kills.values()) < options.kills and not tally.hangs):
            number = tally.runs
            dice = random.Random(1000 * options.seed + number)
            task = options.task or ("fcn" if number % 5 == 4 else "ssd")
            folders = ray_folders()
            before = sum(tally.kills.values())
            _disturb(dice, task, out, f"run-{number}", each, options.pause, tally, options.given)
            word = _judge(out, task, f"run-{number}", tally)
            left = gone(ray_folders() - folders)
            tally.left_behind += bool(left) + bool(shared_memory() - memory)
            print(f"run {number}: {task}, {sum(tally.kills.values()) - before} kills, {word}", flush=True)
    return _report(tally)


def _report(tally: Tally) -> int:
    print(f"\n{sum(tally.kills.values())} kills {tally.kills} in {tally.runs} runs")
    print(
        f"{tally.equal} of {tally.runs} fingerprints equal, {tally.samples_wrong} with samples lost or repeated, ",
        end="",
    )
    print(f"{tally.hangs} hangs, {tally.left_behind} left something behind\n")
    print("| killed | times | median until the next commit | worst |\n|---|---|---|---|")
    for role, seconds in sorted(tally.recovery_s.items()):
        print(f"| {role} | {len(seconds)} | {statistics.median(seconds):.2f} s | {max(seconds):.2f} s |")
    wrong = tally.runs - tally.equal or tally.samples_wrong or tally.hangs or tally.left_behind
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
