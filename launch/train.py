"""One training run from its settings to its folder: what ``pushpull train`` calls, and what Python code can call."""

import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cluster.events import Event, Process
from launch.config import RunConfig, parse_steps
from launch.console import RunConsole, as_note, start_block
from launch.downloads import download_data, download_weights
from launch.drivers import drive
from launch.environment import environment
from launch.fault_file import read_faults
from launch.recorder import Recorder
from launch.resolve import Resolved, resolve
from launch.resume import choose_resume, newest_intact
from launch.run_folder import AUTO, RunFolder, read_json
from launch.torchrun import run_under_torchrun
from models.errors import TaskError
from paramserver.errors import CheckpointError, PushPullError, WorkerLost
from paramserver.state import State
from workers.checkpoint import list_checkpoints
from workers.config import ProfileConfig
from workers.install import check_install
from workers.process_group import restarts, torchrun_rank

__all__ = ["RunResult", "run"]

EXIT_SIGTERM = 143


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    folder: Path
    """The run folder."""
    summary: dict[str, Any]
    """Content of summary.json; empty in ranks other than 0, and after a dry run."""
    exit_code: int
    """0, or 143 after SIGTERM."""


def run(config: RunConfig, *, quiet: bool = False, in_session: bool = False) -> RunResult:
    """Train.

    Args:
        config: the settings.
        quiet: print nothing.
        in_session: whether the caller has started Ray for several runs (``launch.drivers.param_server_session``).

    Raises:
        PushPullError, models.errors.TaskError: what is wrong, in one line. The run folder's status.json has it too,
            once the folder exists.
    """
    check_install()
    if config.backend == "ddp" and torchrun_rank() is not None and restarts():
        config = replace(config, resume=AUTO)  # a rank has died, and torchrun begins again
    torch.set_num_threads(config.threads)
    fetched = _download(config) if config.download and not config.dry_run else []
    resolved = resolve(replace(config, download=False))
    rank = torchrun_rank() if config.backend == "ddp" else None
    writes = rank is None or rank.rank == 0
    folder = RunFolder.choose(config) if writes else RunFolder(Path(config.out) / (config.name or "unnamed"))
    resume, notices = choose_resume(resolved, folder)
    notices = fetched + notices
    quiet = quiet or not writes
    if config.dry_run:
        if not quiet:
            print(start_block(resolved) + f"\nfolder    {folder.path} (dry run: nothing is written or started)")
        return RunResult(folder.path, {}, 0)
    if config.backend == "ddp" and rank is None:
        if not quiet and fetched:
            print("\n".join(map(as_note, fetched)))
        return _launch_ranks(resolved, folder, quiet=quiet)
    resolved = _profiled(resolved, folder)
    if writes:
        folder.create(resolved.config)
        folder.write("env.json", environment())
        if config.resume is not None:
            folder.cut_back(resume.version if resume else 0, folder.source(config))
    console = RunConsole(resolved.worker.plan.steps, resume.version if resume else 0, quiet=quiet)
    console.say("\n".join([start_block(resolved), f"folder    {folder.path}", *map(as_note, notices)]))
    try:
        with _status(folder, active=writes) as status:
            summary, stopped = _record(resolved, folder, console, resume, in_session=in_session)
            status.update(state="stopped" if stopped else "finished", exit_code=EXIT_SIGTERM if stopped else 0)
        if summary:
            console.say(_end_line(summary, folder))
        return RunResult(folder.path, summary, status["exit_code"])
    finally:
        console.close()


def _download(config: RunConfig) -> list[str]:
    fetched = download_data(config.data)
    if config.weights is not None and (config.resume is None or _nothing_to_resume(config)):
        fetched += download_weights(config.weights)
    return fetched


def _nothing_to_resume(config: RunConfig) -> bool:
    return config.resume == AUTO and not list_checkpoints(RunFolder.choose(config).checkpoints)


def _profiled(run: Resolved, folder: RunFolder) -> Resolved:
    steps = parse_steps(run.config.profile_steps)
    if steps is None:
        return run
    profile = ProfileConfig(first=steps[0], last=steps[1], folder=str((folder.path / "profile").absolute()))
    return replace(run, worker=replace(run.worker, profile=profile))


def _launch_ranks(resolved: Resolved, folder: RunFolder, *, quiet: bool) -> RunResult:
    config = resolved.config
    if folder.path.exists() and config.overwrite and not config.resume:
        folder.create(config)  # emptied here: the ranks must all find the same folder
    named = replace(config, out=str(folder.path.parent), name=folder.path.name, overwrite=True)
    code = run_under_torchrun(named, folder, quiet=quiet)
    return RunResult(folder.path, read_json(folder.path / "summary.json"), code)


@contextmanager
def _status(folder: RunFolder, *, active: bool) -> Iterator[dict[str, Any]]:
    """Keep status.json: written at the start, and on every way out."""
    status: dict[str, Any] = {"state": "running", "exit_code": None, "error": None, "pid": os.getpid()}

    def write() -> None:
        folder.write("status.json", {**status, "time": time.time()})

    if active:
        write()
    try:
        yield status
        if active:
            write()
    except KeyboardInterrupt:
        status.update(state="interrupted", exit_code=130)
        if active:
            write()
        raise
    except BaseException as error:
        status.update(state="failed", exit_code=1, error=_described(error))
        # Whichever rank fails is heard, and the first one best: the others then fail for want of it.
        if folder.path.is_dir() and not _has_failed(folder):
            with suppress(PushPullError):  # what went wrong may be that nothing can be written
                write()
        raise


def _described(error: BaseException) -> str:
    """Our own errors say all there is; of others the class and the place matter, too."""
    if isinstance(error, PushPullError | TaskError):
        return str(error)
    *_, place = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"


def _has_failed(folder: RunFolder) -> bool:
    try:
        return bool(read_json(folder.path / "status.json")["state"] == "failed")
    except CheckpointError:
        return False


def _record(
    run: Resolved, folder: RunFolder, console: RunConsole, resume: State | None, *, in_session: bool
) -> tuple[dict[str, Any], bool]:
    """Train, write everything down, and say whether the run was stopped before its end."""
    rank = torchrun_rank() if run.config.backend == "ddp" else None
    last = resume.version if resume else 0

    def take_down(event: Event, processes: list[Process]) -> None:
        if event.kind != "spare":  # that is no more than a change of what runs
            console.say(as_note(event.text))
            folder.append("events.jsonl", event.row())
        _write_processes(folder, processes)

    restore = partial(_newest_saved, run, folder)
    faults = read_faults(run.config.faults, folder.path)
    with drive(run, resume, in_session=in_session, restore=restore, on_event=take_down, faults=faults) as running:
        if rank is not None and rank.rank != 0:
            last = max((report.step for report in running.reports), default=last)
            return {}, last < run.worker.plan.steps
        for notice in running.notices:
            console.say(as_note(notice))
        _write_processes(folder, running.processes)
        recorder = Recorder(run, folder, console, running.state_at)
        try:
            for report in running.reports:
                recorder.take(report)
                last = report.step
        except WorkerLost:
            with suppress(PushPullError):
                recorder.save(running.state_at(last))  # so that --resume loses nothing
            raise
        return recorder.finish(running.state_at(last)), last < run.worker.plan.steps


def _write_processes(folder: RunFolder, processes: list[Process]) -> None:
    folder.write("processes.json", [process._asdict() for process in processes])


def _newest_saved(run: Resolved, folder: RunFolder) -> State | None:
    """What the run can go back to, if it has written a checkpoint."""
    try:
        return newest_intact(folder.path, run)[0]
    except CheckpointError:
        return None


def _end_line(summary: dict[str, Any], folder: RunFolder) -> str:
    stand_in = " (CPU stand-ins, no GPU figure)" if summary["simulated"] else ""
    return (
        f"done      {summary['steps']} steps, loss {summary['loss']['first']:.4f} -> {summary['loss']['last']:.4f}, "
        f"{summary['images_per_s']:.1f} images/s{stand_in}\n"
        f"          fingerprint {summary['fingerprint'][:16]}…, all in {folder.path}"
    )
