"""``pushpull diff``: where two runs part."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.run_folder import RunFolder, read_json
from paramserver.errors import CheckpointError

__all__ = ["Difference", "diff_runs"]

_NOT_OF_THE_RESULT = ("name", "out", "overwrite", "resume", "dry_run")
"""Settings of a call, not of a run."""


@dataclass(frozen=True)
class Difference:
    """What two runs have and have not in common."""

    settings: dict[str, tuple[Any, Any]]
    """Settings that differ."""
    compared: dict[str, int] = field(default_factory=dict)
    """How many steps were compared, by what: ``fingerprint``, ``loss``, ``samples``."""
    parted: dict[str, int] = field(default_factory=dict)
    """The first step that differs, by what it differs in."""
    ends: tuple[str | None, str | None] = (None, None)
    """Fingerprints of both ends, where the runs have ended."""

    @property
    def equal(self) -> bool:
        """Whether nothing differs that the runs have both recorded."""
        return not self.parted and self.ends[0] == self.ends[1]

    def lines(self) -> list[str]:
        """The difference in words."""
        said = [f"setting     {name}: {one!r} and {other!r}" for name, (one, other) in self.settings.items()]
        for what, count in self.compared.items():
            step = self.parted.get(what)
            verdict = f"equal in all {count} steps that both have" if step is None else f"differs first in step {step}"
            said.append(f"{what:11} {verdict}")
        if "fingerprint" not in self.compared:
            said.append("fingerprint of no step is in both: --fingerprint-every records them")
        if None not in self.ends:
            same = "equal" if self.ends[0] == self.ends[1] else "different"
            said.append(f"end         {same}: {self.ends[0]} and {self.ends[1]}")
        return said


def diff_runs(one: Path, other: Path) -> Difference:
    """Compare two run folders: settings, then step by step fingerprints, losses and samples, then the ends.

    Raises:
        ConfigError: if one is no run folder.
    """
    folders = (RunFolder(one), RunFolder(other))
    first, second = (folder.read_config().to_dict() for folder in folders)
    settings = {
        name: (first[name], second[name])
        for name in first
        if first[name] != second.get(name) and name not in _NOT_OF_THE_RESULT
    }
    compared: dict[str, int] = {}
    parted: dict[str, int] = {}
    for what, name in (("fingerprint", "metrics.jsonl"), ("loss", "metrics.jsonl"), ("samples", "ledger.jsonl")):
        left, right = ({row["step"]: _of(row, what) for row in folder.rows(name)} for folder in folders)
        both = [step for step in sorted(left) if step in right and None not in (left[step], right[step])]
        if both:
            compared[what] = len(both)
        if unlike := [step for step in both if left[step] != right[step]]:
            parted[what] = unlike[0]
    return Difference(settings, compared, parted, (_end_of(one), _end_of(other)))


def _of(row: dict[str, Any], what: str) -> Any:
    if what == "samples":
        return [(part["index"], part["samples"]) for part in row["microbatches"]]
    return row.get(what)


def _end_of(folder: Path) -> str | None:
    try:
        return str(read_json(folder / "summary.json")["state_fingerprint"])
    except (CheckpointError, KeyError):
        return None
