"""Checkpoints go around to the bit, load outside of PushPull, and are refused when torn."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from paramserver.config import OptimizerConfig, ServerConfig
from paramserver.errors import CheckpointError
from paramserver.fingerprint import fingerprint
from paramserver.reduction import Node
from paramserver.state import State
from tests.support.tiny_task import TinyNet, TinyTask
from tests.support.training import Run, train_single, train_workers
from workers.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from workers.config import PlanConfig, WorkerConfig

OPTIMIZERS = {
    "sgd": OptimizerConfig(lr=0.1, momentum=0.9, frozen=("stem.bias",)),
    "adam": OptimizerConfig(name="adam", lr=0.01),
}


def _config(steps: int, num_workers: int = 1) -> WorkerConfig:
    plan = PlanConfig(batch_size=6, microbatches=2, steps=steps)
    return WorkerConfig(plan=plan, num_workers=num_workers, channels_last=True, evaluate=False)


def _train(name: str, steps: int, resume: State | None = None) -> Run:
    return train_single(TinyTask(), _config(steps), OPTIMIZERS[name], ServerConfig(), resume)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_equals_the_one_that_never_stopped(name: str, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "checkpoints", _train(name, 2).state, {"seed": 7})
    state, meta = load_checkpoint(find_checkpoint(tmp_path))
    assert path == tmp_path / "checkpoints" / "step_2"
    assert (state.version, meta["step"], meta["seed"]) == (2, 2, 7)
    wanted = _train(name, 5)
    two = ServerConfig(num_servers=2, slice_bytes=256)
    for run in (
        _train(name, 5, state),
        train_workers(TinyTask(), _config(5, num_workers=2), OPTIMIZERS[name], two, state),
    ):
        assert run.fingerprint == wanted.fingerprint
        assert run.optimizer_fingerprint == wanted.optimizer_fingerprint


def test_the_model_loads_with_plain_torch(tmp_path: Path) -> None:
    state = _train("sgd", 1).state
    path = save_checkpoint(tmp_path, state, {})
    model = TinyNet()
    model.load_state_dict(safetensors.torch.load_file(path / "model.safetensors"), strict=True)
    assert fingerprint(model.state_dict()) == fingerprint(state.state_dict())
    assert json.loads((path / "meta.json").read_text())["fingerprint"] == fingerprint(state.state_dict())


def test_the_newest_by_number_is_found_and_unfinished_ones_are_not(tmp_path: Path) -> None:
    state = _train("sgd", 1).state
    for version in (9, 10, 2):
        save_checkpoint(tmp_path / "checkpoints", State(version, state.values, state.integers), {})
    (tmp_path / "checkpoints" / ".step_99.1234").mkdir()
    (tmp_path / "checkpoints" / "step_tmp").mkdir()
    assert find_checkpoint(tmp_path).name == "step_10"
    assert find_checkpoint(tmp_path / "checkpoints" / "step_2").name == "step_2"
    assert {entry.name for entry in (tmp_path / "checkpoints" / "step_9").iterdir()} == {
        "model.safetensors",
        "trainer.pt",
        "meta.json",
    }


def test_saving_again_replaces(tmp_path: Path) -> None:
    state = _train("sgd", 1).state
    save_checkpoint(tmp_path, state, {"try": 1})
    save_checkpoint(tmp_path, state, {"try": 2})
    assert load_checkpoint(tmp_path / "step_1")[1]["try"] == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_1"]


def test_no_checkpoint_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint there; a run saves one at its end"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.pt", "meta.json"])
@pytest.mark.parametrize("harm", ["missing", "empty", "cut"])
def test_a_torn_file_is_refused_by_the_checkpoints_name(name: str, harm: str, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, _train("sgd", 1).state, {})
    file = path / name
    content = file.read_bytes()
    file.unlink()
    if harm != "missing":
        file.write_bytes(b"" if harm == "empty" else content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="step_1"):
        load_checkpoint(path)


def test_a_changed_parameter_is_found_by_the_fingerprint(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, _train("sgd", 1).state, {})
    model = safetensors.torch.load_file(path / "model.safetensors")
    model["scale"] += 1
    safetensors.torch.save_file(model, path / "model.safetensors")
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)


class _Evil:
    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self._trace,)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, _train("sgd", 1).state, {})
    torch.save(
        {"version": 1, "integers": [], "constants": [], "optimizer": _Evil(tmp_path / "trace")}, path / "trainer.pt"
    )
    with pytest.raises(CheckpointError, match="step_1"):
        load_checkpoint(path)
    assert not (tmp_path / "trace").exists()


def _with_residuals(state: State) -> State:
    generator = torch.Generator().manual_seed(0)
    residuals = {
        Node(lo, lo + 2): {name: torch.randn(state.values[name].shape, generator=generator) for name in state.optimizer}
        for lo in (0, 2)
    }
    return replace(state, residuals=residuals)


def test_residuals_go_around_by_tree_node_and_key(tmp_path: Path) -> None:
    state = _with_residuals(_train("sgd", 1).state)
    path = save_checkpoint(tmp_path, state, {})
    assert "0-2/stem.weight" in safetensors.torch.load_file(path / "residuals.safetensors")
    loaded, meta = load_checkpoint(path)
    assert loaded.residuals.keys() == state.residuals.keys() == {Node(0, 2), Node(2, 4)}
    for node, by_key in state.residuals.items():
        assert fingerprint(loaded.residuals[node]) == fingerprint(by_key)
    assert meta["state_fingerprint"] == fingerprint(replace(state, residuals={}).everything())


@pytest.mark.parametrize("harm", ["missing", "cut", "changed"])
def test_residuals_that_are_damaged_are_refused(harm: str, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, _with_residuals(_train("sgd", 1).state), {})
    file = path / "residuals.safetensors"
    residuals = safetensors.torch.load_file(file)
    if harm == "missing":
        file.unlink()
    elif harm == "cut":
        file.write_bytes(file.read_bytes()[:100])
    else:
        safetensors.torch.save_file({**residuals, "0-2/stem.weight": residuals["0-2/stem.weight"] + 1}, file)
    with pytest.raises(CheckpointError, match=r"step_1.*residuals" if harm != "cut" else "step_1"):
        load_checkpoint(path)


def test_single_goes_on_without_residuals(tmp_path: Path) -> None:
    state = _train("sgd", 2).state
    loaded, _ = load_checkpoint(save_checkpoint(tmp_path, _with_residuals(state), {}))
    assert _train("sgd", 3, loaded).fingerprint == _train("sgd", 3, state).fingerprint
