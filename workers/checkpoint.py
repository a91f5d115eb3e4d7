"""Checkpoints: written to a temporary folder, flushed to disk, renamed; read without unpickling code."""

import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from paramserver.errors import CheckpointError
from paramserver.fingerprint import fingerprint
from paramserver.reduction import Node
from paramserver.residuals import Residuals
from paramserver.state import State

__all__ = [
    "drop_checkpoints",
    "find_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "save_checkpoint",
    "step_of",
    "sweep_checkpoints",
]

_FORMAT = 2


def save_checkpoint(folder: Path, state: State, meta: Mapping[str, Any]) -> Path:
    """Write ``folder/step_<n>/`` with model.safetensors, trainer.pt and meta.json; gives its path back.

    Residuals, if there are any, go to residuals.safetensors as ``lo-hi/key`` for the tree node over ``[lo, hi)``.

    Args:
        folder: where checkpoints of the run lie.
        state: the whole state at one version.
        meta: plain values that say which run and which data order the state belongs to.

    Raises:
        CheckpointError: if it cannot be written, for instance because the disk is full; nothing of it is left then.
    """
    target = folder / f"step_{state.version}"
    temporary = folder / f".step_{state.version}.{os.getpid()}"
    try:
        _write(temporary, state, meta)
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
        _flush(folder)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # torch and safetensors have their own
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {target} cannot be written: {error}: see whether the disk is full"
        ) from error
    return target


def _write(temporary: Path, state: State, meta: Mapping[str, Any]) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model = {name: value.contiguous() for name, value in state.state_dict().items()}
    safetensors.torch.save_file(model, temporary / "model.safetensors", metadata={"format": "pt"})
    trainer = {
        "version": state.version,
        "optimizer": {key: dict(values) for key, values in state.optimizer.items()},
        "integers": list(state.integers),
        "constants": list(state.constants),
    }
    torch.save(trainer, temporary / "trainer.pt")
    about = {
        "format": _FORMAT,
        "step": state.version,
        "fingerprint": fingerprint(model),
        "state_fingerprint": fingerprint(state.everything()),
        **meta,
    }
    if state.residuals:
        residuals = _named(state.residuals)
        safetensors.torch.save_file(residuals, temporary / "residuals.safetensors")
        about["residual_fingerprint"] = fingerprint(residuals)
    (temporary / "meta.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    for file in temporary.iterdir():
        _flush(file)
    _flush(temporary)


def _named(residuals: Residuals) -> dict[str, Tensor]:
    return {
        f"{node.lo}-{node.hi}/{key}": value.contiguous()
        for node, by_key in residuals.items()
        for key, value in by_key.items()
    }


def _by_node(named: Mapping[str, Tensor]) -> Residuals:
    residuals: dict[Node, dict[str, Tensor]] = {}
    for name, value in named.items():
        node, _, key = name.partition("/")
        lo, _, hi = node.partition("-")
        residuals.setdefault(Node(int(lo), int(hi)), {})[key] = value
    return residuals


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at ``path``: itself, or the newest one of the run folder ``path``.

    Raises:
        CheckpointError: if there is none.
    """
    if (path / "meta.json").is_file():
        return path
    found = list_checkpoints(path / "checkpoints")
    if not found:
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such folder; name a run folder or a folder checkpoints/step_N in it")
        raise CheckpointError(
            f"{path}: no checkpoint there; a run saves one at its end and every --checkpoint-every steps"
        )
    return found[0]


def list_checkpoints(folder: Path) -> list[Path]:
    """All checkpoints in a folder, the newest first."""
    found = [entry for entry in folder.glob("step_*") if entry.name[5:].isdigit() and entry.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint folder, by its name."""
    return int(checkpoint.name[5:])


def drop_checkpoints(folder: Path, keep: int, spared: Collection[int] = ()) -> None:
    """Remove all but the last ``keep`` checkpoints and those of the steps ``spared``."""
    for path in list_checkpoints(folder)[keep:]:
        if step_of(path) not in spared:
            # Under another name first: half a checkpoint must not look like a whole one.
            dropped = path.with_name(f".{path.name}.dropped")
            os.replace(path, dropped)
            shutil.rmtree(dropped)


def sweep_checkpoints(folder: Path) -> None:
    """Remove what a killed run has left half written."""
    for path in folder.glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)


def load_checkpoint(path: Path) -> tuple[State, dict[str, Any]]:
    """The state and the meta data of one checkpoint folder.

    Raises:
        CheckpointError: if a file is missing, torn, or does not fit the others.
    """
    try:
        meta: dict[str, Any] = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        model = safetensors.torch.load_file(path / "model.safetensors")
        trainer = torch.load(path / "trainer.pt", weights_only=True)
        has_residuals = "residual_fingerprint" in meta
        residuals = safetensors.torch.load_file(path / "residuals.safetensors") if has_residuals else {}
        integers, constants = set(trainer["integers"]), set(trainer["constants"])
        state = State(
            version=trainer["version"],
            values={name: value for name, value in model.items() if name not in integers | constants},
            integers={name: model[name] for name in integers},
            constants={name: model[name] for name in constants},
            optimizer=trainer["optimizer"],
            residuals=_by_node(residuals),
        )
    except Exception as error:  # whatever a torn file makes a parser raise
        raise CheckpointError(f"checkpoint {path} cannot be read: {type(error).__name__}: {error}") from error
    if meta.get("format") != _FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {meta.get('format')}, this version of PushPull reads {_FORMAT}: "
            "its model.safetensors can still be loaded by itself"
        )
    if fingerprint(state.everything()) != meta.get("state_fingerprint") or meta.get("step") != state.version:
        raise CheckpointError(f"checkpoint {path} is damaged: its state does not have the fingerprint in meta.json")
    if has_residuals and fingerprint(residuals) != meta["residual_fingerprint"]:
        raise CheckpointError(f"checkpoint {path} is damaged: its residuals do not have the fingerprint in meta.json")
    return state, meta
