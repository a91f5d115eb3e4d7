"""Joining and leaving torchrun's process group: one of the two files that import ``torch.distributed``."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

_MEETING_S = 3e-3
"""Time for every rank to hear of the instant."""

__all__ = ["Rank", "join_gloo", "leave", "meet", "process_group", "restarts", "torchrun_rank"]


class Rank(NamedTuple):
    """This process's place, as torchrun says it."""

    rank: int
    world_size: int
    local_rank: int


def torchrun_rank() -> Rank | None:
    """Place of this process, or None if torchrun did not start it."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if not all(name in os.environ for name in names):
        return None
    return Rank(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"]))


def restarts() -> int:
    """How often torchrun has started the ranks again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def join_gloo(rank: int, world_size: int, port: int, timeout_s: float) -> None:
    """Make this process a rank of a group on this machine, without torchrun; ``leave`` ends it."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )


def meet() -> float:
    """Return once every rank has come here, at one instant on this machine's clock, in seconds, which it gives."""
    instant = torch.tensor(time.perf_counter() + _MEETING_S, dtype=torch.float64)
    dist.all_reduce(instant, dist.ReduceOp.MAX)
    time.sleep(max(0.0, float(instant) - time.perf_counter()))
    return float(instant)


def leave() -> None:
    """Leave the group."""
    dist.destroy_process_group()


@contextmanager
def process_group(device: torch.device, timeout_s: float) -> Iterator[None]:
    """The default group of all ranks: NCCL on GPUs (gloo beside it for CPU tensors), gloo on CPUs."""
    if os.environ.get("MASTER_ADDR") in ("localhost", "127.0.0.1"):
        # Gloo looks its interface up by the host's name, which need not resolve to anything that is there.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout_s)
    store, rank, world_size = next(rendezvous("env://", timeout=limit))
    # torchrun keeps its store when it starts ranks again: those would find addresses of the ones before them.
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = dist.PrefixStore(f"restart-{restart}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=own, rank=rank, world_size=world_size, timeout=limit)
    try:
        yield
    finally:
        dist.destroy_process_group()
