"""Where an actor's process runs, and what it does first."""

import os
import platform
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import ray

from workers.install import check_install

__all__ = ["Place", "machine", "place_of_process", "prepare_process"]


class Place(NamedTuple):
    """Where an actor's process runs."""

    pid: int
    node: str
    """Ray's id of the node."""
    host: str
    machine: str
    """Equal where one process sees the other's pid."""
    device_kind: dict[str, Any] | None = None


def place_of_process(kind: dict[str, Any] | None = None) -> Place:
    """Where the calling actor runs."""
    return Place(os.getpid(), ray.get_runtime_context().get_node_id(), platform.node(), machine(), kind)


def machine() -> str:
    """The running system and its namespace of pids: simulated nodes share them, containers do not."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"


def prepare_process() -> None:
    """What every actor does first."""
    check_install()
    # Arrays out of Ray's store are read-only; we never write them.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
