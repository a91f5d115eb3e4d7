"""Any number of workers and servers gives the bits of one process (E2)."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import HARD, SMALL, train

ALL = [(task, workers, servers) for task in SMALL for workers in (1, 2, 3, 4) for servers in (1, 2)]
CORE = [("ssd", 1, 2), ("ssd", 4, 1), ("fcn", 3, 2)]
"""In every run; the others take minutes."""


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("single")
    return {task: train(out, task, backend="single", **SMALL[task], **HARD).summary for task in SMALL}


def check(out: Path, single: dict[str, dict[str, Any]], task: str, workers: int, servers: int, **more: Any) -> None:
    settings = {**SMALL[task], **HARD, **more}
    result = train(out, "ps", in_session=True, backend="ps", workers=workers, servers=servers, **settings)
    assert result.summary["state_fingerprint"] == single[task]["state_fingerprint"]
    assert result.summary["fingerprint"] == single[task]["fingerprint"]
    assert result.summary["loss"] == single[task]["loss"]


@pytest.mark.parametrize(("task", "workers", "servers"), CORE)
def test_same_bits_as_single(
    ray_cluster: None, tmp_path: Path, single: dict[str, dict[str, Any]], task: str, workers: int, servers: int
) -> None:
    check(tmp_path, single, task, workers, servers)


def test_same_bits_through_rays_object_store(
    ray_cluster: None, tmp_path: Path, single: dict[str, dict[str, Any]]
) -> None:
    check(tmp_path, single, "ssd", 2, 2, transport="ray")


def test_same_bits_with_overlap(ray_cluster: None, tmp_path: Path, single: dict[str, dict[str, Any]]) -> None:
    check(tmp_path, single, "ssd", 2, 1, overlap=True)


@pytest.mark.parametrize(("task", "overlap"), [pytest.param("ssd", False, marks=pytest.mark.slow), ("fcn", True)])
def test_same_bits_when_forward_begins_early(
    ray_cluster: None, tmp_path: Path, single: dict[str, dict[str, Any]], task: str, overlap: bool
) -> None:
    check(tmp_path, single, task, 3, 2, overlap=overlap, early_forward=True)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "workers", "servers"), [case for case in ALL if case not in CORE])
def test_same_bits_as_single_for_the_rest(
    ray_cluster: None, tmp_path: Path, single: dict[str, dict[str, Any]], task: str, workers: int, servers: int
) -> None:
    check(tmp_path, single, task, workers, servers)


def test_same_bits_with_a_vote_adam_and_groups(ray_cluster: None, tmp_path: Path) -> None:
    """Clipping couples all slices, Adam has more state, and groups give slices of their own."""
    settings = {
        **SMALL["ssd"],
        **HARD,
        "optimizer": "adam",
        "lr": 1e-3,
        "momentum": 0.0,
        "clip_grad_norm": 0.5,
        "lr_factors": "class_heads.*=10",
        "freeze": "blocks.0.*",
        "slice_bytes": 65536,
    }
    single = train(tmp_path, "single", backend="single", **settings)
    several = train(tmp_path, "ps", in_session=True, backend="ps", workers=2, servers=3, **settings)
    assert several.summary["state_fingerprint"] == single.summary["state_fingerprint"]


def test_an_evaluation_on_several_workers_gives_the_metrics_of_one(ray_cluster: None, tmp_path: Path) -> None:
    settings = {**SMALL["ssd"], **HARD, "evaluate": True, "steps": 2}
    single = train(tmp_path, "single", backend="single", **settings)
    several = train(tmp_path, "ps", in_session=True, backend="ps", workers=3, **settings)
    assert several.summary["metrics"] == single.summary["metrics"]


def test_the_last_minibatch_may_be_shorter_than_the_workers(ray_cluster: None, tmp_path: Path) -> None:
    """512 samples in minibatches of 511: the second one has one sample and three empty microbatches."""
    settings = {**SMALL["ssd"], **HARD, "batch_size": 511, "steps": 2}
    single = train(tmp_path, "single", backend="single", **settings)
    several = train(tmp_path, "ps", in_session=True, backend="ps", workers=2, **settings)
    assert several.summary["state_fingerprint"] == single.summary["state_fingerprint"]


@pytest.mark.parametrize("task", ["ssd", pytest.param("fcn", marks=pytest.mark.slow)])
def test_resuming_between_steps_gives_the_uninterrupted_bits(
    ray_cluster: None, tmp_path: Path, single: dict[str, dict[str, Any]], task: str
) -> None:
    """Written under ``ps`` with two servers, continued under ``single`` and under ``ps`` with one."""
    settings = {**SMALL[task], **HARD, "checkpoint_every": 2}
    whole = train(tmp_path, "ps", in_session=True, backend="ps", workers=2, servers=2, **settings)
    assert whole.summary["fingerprint"] == single[task]["fingerprint"]
    resume = str(whole.folder / "checkpoints" / "step_2")
    for backend, more in (("single", {}), ("ps", {"workers": 1, "servers": 1})):
        resumed = train(tmp_path, backend + "-on", in_session=True, backend=backend, resume=resume, **settings, **more)
        assert resumed.summary["state_fingerprint"] == whole.summary["state_fingerprint"]
        ledger = [(resumed.folder / name).read_text().count("\n") for name in ("ledger.jsonl", "metrics.jsonl")]
        assert ledger == [6, 6]
