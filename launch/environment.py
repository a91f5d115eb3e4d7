"""What a run ran on: for ``pushpull env`` and env.json. Holds no secrets: no environment variables, no host names."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from paramserver.fused_adam import fused_adam
from paramserver.fused_sgd import fused_sgd
from workers.device import cpu_model

__all__ = ["environment", "version"]

_PACKAGES = ("torch", "torchvision", "ray", "numpy", "jsonargparse", "safetensors", "rich", "matplotlib")


def version() -> str:
    """Version of the installed distribution."""
    try:
        return importlib.metadata.version("pushpull-sgd")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def environment() -> dict[str, Any]:
    """Machine, library versions and commit."""
    return {
        "pushpull": version(),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "fused_sgd": fused_sgd() is not None,
        "fused_adam": fused_adam() is not None,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "packages": {name: _installed(name) for name in _PACKAGES},
    }


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
