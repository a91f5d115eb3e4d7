"""Runs to which something happens, and what they must be equal to."""

import json
from pathlib import Path
from typing import Any

import yaml

from launch.train import RunResult
from tests.support.runs import HARD, SMALL, train

SETTINGS: dict[str, Any] = {**HARD, "slice_bytes": 1 << 14}
"""Many slices, so that servers have several and a step can be half updated."""

Ledger = list[tuple[int, list[tuple[int, list[int]]]]]


class Undisturbed:
    """What one device gives, task by task; each is trained once."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._known: dict[str, RunResult] = {}

    def of(self, task: str) -> RunResult:
        """The run of a task."""
        if task not in self._known:
            self._known[task] = train(self._out, task, backend="single", **SMALL[task], **SETTINGS)
        return self._known[task]

    def check(self, task: str, run: RunResult) -> None:
        """See that a run has the same bits, the same samples in the same places, and the same losses."""
        want = self.of(task)
        assert run.summary["fingerprint"] == want.summary["fingerprint"]
        assert run.summary["state_fingerprint"] == want.summary["state_fingerprint"]
        assert ledger_of(run.folder) == ledger_of(want.folder)
        assert losses_of(run.folder) == losses_of(want.folder)


def disturbed(out: Path, task: str, faults: list[dict[str, Any]], **settings: Any) -> RunResult:
    """A parameter-server run in the session of the test, to which ``faults`` happen."""
    path = out / "faults.yaml"
    path.write_text(yaml.safe_dump(faults), encoding="utf-8")
    options = {**SMALL[task], **SETTINGS, "workers": 2, **settings}
    return train(out, "run", backend="ps", in_session=True, faults=str(path), **options)


def kill(role: str, index: int, step: int, stage: str) -> dict[str, Any]:
    """A fault."""
    return {"kill": {"role": role, "index": index, "step": step, "stage": stage}}


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """Rows of one of a run's JSONL files."""
    path = folder / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def ledger_of(folder: Path) -> Ledger:
    """Which samples were in which microbatch of which step, whoever computed it."""
    rows = rows_of(folder, "ledger.jsonl")
    return [(row["step"], [(part["index"], part["samples"]) for part in row["microbatches"]]) for row in rows]


def losses_of(folder: Path) -> list[tuple[int, float]]:
    """The loss of each step."""
    return [(row["step"], row["loss"]) for row in rows_of(folder, "metrics.jsonl")]


def lost_in(folder: Path) -> list[tuple[str, int, int]]:
    """Role, number and open step of each process that the run has lost."""
    events = rows_of(folder, "events.jsonl")
    return [(row["role"], row["number"], row["step"]) for row in events if row["kind"] == "lost"]
