"""Setting a resolved run going on each backend: all three give the same three things to whoever records it."""

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from cluster.config import TransportName
from cluster.events import Event, Process
from launch.recorder import read_steps
from launch.resolve import Resolved
from launch.signals import stop_on_sigterm
from paramserver.state import State
from workers.assembly import build_ddp_worker, build_single_worker, describe
from workers.device import update_threads
from workers.faults import NO_FAULTS, Faults
from workers.process_group import process_group, torchrun_rank
from workers.report import EvaluationReport, StepReport

__all__ = ["Running", "drive", "idle_cores", "param_server_session"]

OnEvent = Callable[[Event, list[Process]], None]

_MIB = 1 << 20
_DDP_TIMEOUT_S = 300.0
"""A process group's timeout is fixed when it is made, before anybody knows how long a step takes."""


class Running(NamedTuple):
    """A run that is under way."""

    reports: Iterator[StepReport | EvaluationReport]
    """Committed steps and evaluations, in order; read it to the end."""
    state_at: Callable[[int], State]
    """Reads the version just reported, if it is one that checkpoints are due at, or the last one."""
    processes: list[Process]
    """What runs at the start."""
    notices: tuple[str, ...] = ()
    """What the user should know before the first step, a line each."""


def drive(
    run: Resolved,
    resume: State | None,
    *,
    in_session: bool = False,
    restore: Callable[[], State | None] = lambda: None,
    on_event: OnEvent = lambda *_: None,
    faults: Faults = NO_FAULTS,
) -> AbstractContextManager[Running]:
    """Start a run on its backend; leaving the context stops whatever was started.

    Args:
        run: what to run.
        resume: state to go on from, or None.
        in_session: whether the caller keeps a Ray session (``param_server_session``) for several runs.
        restore: the newest state that was saved, if any was, for when a server is lost with its memory.
        on_event: called when processes of the run die or are replaced, with what runs then.
        faults: what is to happen to it.
    """
    if run.config.backend == "ps":
        return _param_server(run, resume, restore, on_event, faults, in_session=in_session)
    return _ddp(run, resume) if run.config.backend == "ddp" else _single(run, resume)


@contextmanager
def _single(run: Resolved, resume: State | None) -> Iterator[Running]:
    with stop_on_sigterm() as stop:
        worker, backend = build_single_worker(run.task, run.worker, run.optimizer, run.servers, stop, resume)
        processes = [Process(role, 0, os.getpid(), "local") for role in ("driver", "worker")]
        with closing(backend), closing(worker):
            yield Running(worker.run(), lambda _: backend.state(), processes)


@contextmanager
def _ddp(run: Resolved, resume: State | None) -> Iterator[Running]:
    rank = torchrun_rank()
    assert rank is not None
    config = replace(run.worker, worker=rank.rank, device_index=rank.local_rank)
    with (
        stop_on_sigterm() as stop,
        process_group(torch.device(config.device), run.config.step_timeout or _DDP_TIMEOUT_S),
    ):
        worker, backend = build_ddp_worker(run.task, config, run.optimizer, run.servers, stop, resume)
        processes = [Process("worker", index, pid, "local") for index, pid in enumerate(backend.gather_pids())]
        with closing(backend), closing(worker):
            yield Running(worker.run(), lambda _: backend.state(), processes)


def param_server_session(
    address: str | None,
    workers: int,
    servers: int,
    model_bytes: int,
    transport: TransportName = "auto",
    spares: int = 0,
) -> Any:
    """A Ray session with room for that many actors and for the tensors that go through its object store."""
    from cluster.session import ray_session

    # The state at the start and at checkpoints; with Ray's transport also the gradients of a step from every worker
    # and a few versions from every server, which may be on their way at once.
    store = 64 * _MIB + 4 * model_bytes * (2 if transport == "auto" else workers + servers + 2)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    num_cpus = workers + spares + servers
    return ray_session(address=address, num_cpus=num_cpus, num_gpus=gpus, store_bytes=store)


def idle_cores(workers: int, servers: int) -> int:
    """Threads of each server, so that together they use the cores of workers that wait for them."""
    return max(1, min(workers, os.cpu_count() or 1) // servers)


def _server_threads(run: Resolved) -> int:
    config, workers = run.config, run.worker.num_workers
    if run.worker.device == "cuda":  # workers leave the cores alone
        return update_threads("cuda", config.servers)
    return idle_cores(workers * config.threads, config.servers)


@contextmanager
def _param_server(
    run: Resolved,
    resume: State | None,
    restore: Callable[[], State | None],
    on_event: OnEvent,
    faults: Faults,
    *,
    in_session: bool,
) -> Iterator[Running]:
    config, total = run.config, run.worker.plan.steps
    torch.set_num_threads(run.worker.threads)  # as in the other backends: what is merged here may depend on it
    partition, initial = describe(run.task, run.worker, run.optimizer, run.servers)[1:]
    workers, model_bytes = run.worker.num_workers, 4 * partition.length
    most = max(workers, *faults.scaling.values(), 0)
    session = (
        nullcontext()
        if in_session
        else param_server_session(config.address, most, config.servers, model_bytes, config.transport, config.spares)
    )
    with session, stop_on_sigterm() as stop:
        from cluster.config import ClusterConfig
        from cluster.coordinator import Coordinator

        held = read_steps(config, total)
        cluster = ClusterConfig(
            options=run.options,
            worker=run.worker,
            optimizer=run.optimizer,
            servers=run.servers,
            server_threads=config.server_threads or _server_threads(run),
            transport=config.transport,
            wire_precision=config.wire_precision,
            arena_dir=config.arena_dir,
            held_versions=held,
            share_device=config.share_device,
            run=uuid.uuid4().hex,
            num_samples=run.num_samples,
            spares=config.spares,
            min_workers=config.min_workers,
            replicas=config.replicas,
            faults=faults,
            verify_every=config.verify_every,
            step_timeout_s=config.step_timeout,
        )
        initial = resume or initial
        with Coordinator(
            run.source,
            cluster,
            partition,
            initial,
            restore=lambda: restore() or initial,
            on_event=on_event,
        ) as coordinator:
            coordinator.start()
            yield Running(
                coordinator.run(stop),
                lambda version: coordinator.state(version, release=version in held),
                coordinator.processes,
                tuple(coordinator.notices),
            )
