"""Joining a cluster that somebody else started."""

import json
from pathlib import Path

import pytest

from tests.support.heads import StartHead, ray_start, start_head
from tests.support.processes import start
from tests.support.runs import HARD, SMALL, train

__all__ = ["start_head"]

HARD_BUT_SHORT = {**HARD, "steps": 3}


@pytest.mark.slow
def test_a_run_on_a_joined_cluster_has_the_bits_of_single(start_head: StartHead, tmp_path: Path) -> None:
    """In a process of its own: Ray reads a token once, and this one may have used another."""
    head = start_head(3)
    settings = {**SMALL["ssd"], **HARD, "steps": 2}
    options = [f"--{key.replace('_', '-')}={str(value).lower()}" for key, value in settings.items() if key != "task"]
    options += ["--backend=ps", "--workers=2", f"--address={head}", f"--out={tmp_path}", "--name=ps"]
    process = start("train", "ssd", *options)
    _, complaint = process.communicate(timeout=90)
    assert process.returncode == 0, complaint
    joined = json.loads((tmp_path / "ps" / "summary.json").read_text())
    single = train(tmp_path, "single", backend="single", **settings)
    assert joined["fingerprint"] == single.summary["fingerprint"]


EARLY = ["--overlap=true", "--early-forward=true"]
SPREAD: dict[str, tuple[str, int, int, list[str]]] = {
    "fcn 3/2 early": ("fcn", 3, 2, EARLY),
}
"""Task, workers, servers, options; in every run."""
SLOW_SPREAD: dict[str, tuple[str, int, int, list[str]]] = {
    "fcn 3/1": ("fcn", 3, 1, []),
    "fcn 3/2 ray": ("fcn", 3, 2, ["--transport=ray"]),
    "fcn 4/2": ("fcn", 4, 2, []),
    **{f"ssd {n}/{s} early": ("ssd", n, s, EARLY) for n in (1, 2, 3, 4) for s in (1, 2)},
    **{f"ssd {n}/1": ("ssd", n, 1, []) for n in (1, 2, 4)},
}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Fingerprint of each task on one device."""
    out = tmp_path_factory.mktemp("single")
    runs = {task: train(out, task, backend="single", **SMALL[task], **HARD_BUT_SHORT) for task in SMALL}
    return {task: run.summary["fingerprint"] for task, run in runs.items()}


@pytest.mark.parametrize(
    ("task", "workers", "servers", "extra"),
    [
        *(pytest.param(*case, id=name) for name, case in SPREAD.items()),
        *(pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in SLOW_SPREAD.items()),
    ],
)
def test_a_run_on_two_nodes_has_the_bits_of_single(
    start_head: StartHead,
    single: dict[str, str],
    tmp_path: Path,
    task: str,
    workers: int,
    servers: int,
    extra: list[str],
) -> None:
    """As many logical CPUs as actors, so that neither node holds them all: workers push to servers elsewhere."""
    here = (workers + servers + 1) // 2
    head = start_head(here)
    ray_start(f"--address={head}", f"--num-cpus={workers + servers - here}")
    settings = {**SMALL[task], **HARD_BUT_SHORT}
    options = [f"--{key.replace('_', '-')}={str(value).lower()}" for key, value in settings.items() if key != "task"]
    options += ["--backend=ps", f"--workers={workers}", f"--servers={servers}", *extra]
    process = start("train", task, *options, f"--address={head}", f"--out={tmp_path}", "--name=ps")
    said, complaint = process.communicate(timeout=90)
    assert process.returncode == 0, complaint
    joined = json.loads((tmp_path / "ps" / "summary.json").read_text())
    processes = json.loads((tmp_path / "ps" / "processes.json").read_text())
    nodes = {role: [p["node"] for p in processes if p["role"] == role] for role in ("worker", "server", "relay")}
    assert len({*nodes["worker"], *nodes["server"]}) == 2
    apart = {node for node in nodes["worker"] if set(nodes["server"]) != {node}}
    relayed = "--transport=ray" not in extra
    assert len(nodes["relay"]) == (len(apart) if relayed else 0)
    if workers == 3:  # of microbatches [0, 2), [2, 3) and [3, 4) the first two together are no tree node
        uneven = relayed and nodes["worker"].count(nodes["worker"][0]) == 2 and nodes["worker"][0] in apart
        assert ("sends 2 tree nodes" in said) == uneven
    assert joined["fingerprint"] == single[task]


@pytest.mark.slow
def test_a_run_on_two_nodes_rounds_between_them_and_can_be_gone_on_from(start_head: StartHead, tmp_path: Path) -> None:
    """Ray places the second run as it likes: relays take residuals up, or what is dropped is said."""
    head = start_head(3)
    ray_start(f"--address={head}", "--num-cpus=1")
    settings = {**SMALL["ssd"], **HARD, "wire_precision": "bf16", "checkpoint_every": 3, "out": tmp_path}
    options = [f"--{key.replace('_', '-')}={str(value).lower()}" for key, value in settings.items() if key != "task"]
    options += ["--workers=3", f"--address={head}"]
    shown = {}
    for name, more in (("whole", []), ("on", [f"--resume={tmp_path}/whole/checkpoints/step_3"])):
        process = start("train", "ssd", *options, f"--name={name}", *more)
        shown[name], complaint = process.communicate(timeout=90)
        assert process.returncode == 0, complaint
        assert "wire      bf16" in shown[name]
    assert (tmp_path / "whole" / "checkpoints" / "step_3" / "residuals.safetensors").exists()
    whole, on = (json.loads((tmp_path / name / "summary.json").read_text()) for name in shown)
    assert (whole["state_fingerprint"] == on["state_fingerprint"]) != ("are dropped" in shown["on"])
