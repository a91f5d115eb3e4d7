"""A scenario of faults is read from YAML; what is wrong with it is said by the entry."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.fault_file import read_faults
from paramserver.errors import ConfigError
from workers.faults import NO_FAULTS, Fault

KILL = {"kill": {"role": "worker", "index": 1, "step": 3, "stage": "push"}}
WRONG: dict[str, tuple[Any, str]] = {
    "no list": ({"kill": {}}, "is not a list"),
    "no fault": ([{"explode": {"role": "worker", "step": 1, "stage": "push"}}], "entry 1: 'explode' is no fault"),
    "a role": ([KILL, {"kill": {"role": "cook", "step": 1, "stage": "push"}}], "entry 2: role 'cook'"),
    "a stage": ([{"kill": {"role": "worker", "step": 1, "stage": "lunch"}}], "stage 'lunch': use one of split"),
    "no stage": ([{"kill": {"role": "worker", "step": 1}}], "entry 1 lacks stage"),
    "a key": ([{"kill": {**KILL["kill"], "when": 3}}], "when is not known"),
    "step 0": ([{"kill": {**KILL["kill"], "step": 0}}], "step counts from 1"),
    "a word for a step": ([{"kill": {**KILL["kill"], "step": "first"}}], "a value has the wrong type"),
    "a server's gradient": ([{"nan": {"role": "server", "step": 1, "stage": "compute"}}], "nan wants role worker"),
    "no workers": ([{"scale": {"step": 1}}], "scale wants workers"),
    "two at once": ([{**KILL, "stop": {}}], "entry 1 is not like"),
}


def _write(folder: Path, entries: Any) -> str:
    path = folder / "faults.yaml"
    path.write_text(yaml.safe_dump(entries), encoding="utf-8")
    return str(path)


def test_entries_are_read(tmp_path: Path) -> None:
    delay = {"delay": {"role": "server", "step": 2, "stage": "update", "seconds": 0.5}}
    faults = read_faults(_write(tmp_path, [KILL, delay, {"scale": {"workers": 3, "step": 4}}]), tmp_path)
    assert faults.faults[0] == Fault(0, "kill", "worker", 1, 3, "push")
    assert faults.faults[1] == Fault(1, "delay", "server", 0, 2, "update", seconds=0.5)
    assert faults.scaling == {4: 3}
    assert faults.folder == str(tmp_path)
    assert read_faults(None, tmp_path) is NO_FAULTS


@pytest.mark.parametrize(("entries", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_said(tmp_path: Path, entries: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_faults(_write(tmp_path, entries), tmp_path)


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_faults(str(tmp_path / "none.yaml"), tmp_path)


def test_a_fault_happens_once_even_if_its_step_is_taken_again(tmp_path: Path) -> None:
    faults = read_faults(_write(tmp_path, [{"nan": {"role": "worker", "step": 3, "stage": "compute"}}]), tmp_path)
    observer, again = faults.observer("worker", 0), faults.observer("worker", 0)
    assert observer is not None
    assert again is not None
    assert faults.observer("worker", 1) is None, "nothing can happen there"
    assert observer.at(2, "compute") is None
    assert observer.at(3, "push") is None
    assert observer.at(3, "compute") == "nan"
    assert again.at(3, "compute") is None, "whoever comes to the step again"
