"""Small training runs for tests: real backends, tiny images."""

import multiprocessing
from pathlib import Path
from typing import Any

from launch.config import RunConfig
from launch.train import RunResult, run

SMALL: dict[str, dict[str, Any]] = {
    "ssd": {"task": "ssd", "image_size": "64", "lr": 0.05},
    "fcn": {"task": "fcn", "image_size": "48x64", "lr": 0.02},
}
"""Both tasks with images that take milliseconds; the synthetic data has images without boxes and without labels."""

HARD: dict[str, Any] = {
    "batch_size": 15,
    "microbatches": 4,
    "steps": 6,
    "seed": 1,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "schedule": "cosine",
    "warmup_steps": 3,
    "evaluate": False,
}
"""Unequal microbatches, momentum, weight decay and a warm-up: what an inexact server would get wrong."""


def train(out: Path, name: str, *, in_session: bool = False, **settings: Any) -> RunResult:
    """Train quietly into ``out/name``."""
    spares = settings.pop("spares", 1 if settings.get("faults") else 0)  # they take time to start
    return run(RunConfig(out=str(out), name=name, spares=spares, **settings), quiet=True, in_session=in_session)


def summary_of(out: Path, name: str, **settings: Any) -> dict[str, Any]:
    """The summary of a run in a process of its own: one that trains keeps all memory that a step has freed."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_summary, (out, name, settings))


def _summary(out: Path, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    return train(out, name, **settings).summary
