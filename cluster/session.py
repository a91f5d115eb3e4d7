"""Starting, joining and stopping Ray so that nothing is asked, shown, opened to the network or left behind."""

import contextlib
import fcntl
import functools
import os
import secrets
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO

from paramserver.errors import ConfigError

__all__ = ["check_address", "ray_session"]

_PREFIX = "pushpull-ray-"
_MIB = 1 << 20
_PROBE_S = 5.0
_TRACKERS_S = 5.0
_LOOK_S = 0.02

# Read by Ray when it is imported or started, so they must stand before ``import ray``.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_worker_niceness": "0",  # 15 by default: anything else on the machine would go first
    "RAY_DEDUP_LOGS": "0",  # it takes "step 1" and "step 2" for the same line
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",  # masking GPUs per actor breaks peer access
}


@contextmanager
def ray_session(*, address: str | None, num_cpus: int, num_gpus: int, store_bytes: int) -> Iterator[None]:
    """A Ray cluster for the block: a private one on this machine, or the one at ``address``.

    The private one listens on loopback alone, has its own token, no dashboard, and a temporary folder that goes with
    it; folders that a killed run left are swept.

    Args:
        address: ``host:port`` of a running head, or None.
        num_cpus: logical CPUs of the private cluster: places for actors.
        num_gpus: GPUs of the private cluster.
        store_bytes: size of the private cluster's object store.

    Raises:
        ConfigError: if nobody listens at ``address``.
    """
    if address is not None:
        check_address(address)
        with _environment(_QUIET):
            import ray

            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            _silence()
            try:
                with _watched():
                    yield
            finally:
                ray.shutdown()
        return
    _sweep()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))  # short: a socket's path may have about 108 bytes
    with _locked(folder / "lock"):
        try:
            with _environment({**_QUIET, **_private(folder)}):
                yield from _local(folder, num_cpus, num_gpus, store_bytes)
        finally:
            _end_processes_of(folder)  # what Ray itself did not end
            shutil.rmtree(folder, ignore_errors=True)


def _local(folder: Path, num_cpus: int, num_gpus: int, store_bytes: int) -> Iterator[None]:
    import ray

    # Ray puts the driver's working directory first on the actors' sys.path: it may hold somebody's models/ or launch/.
    with contextlib.chdir(folder), _in_groups_of_their_own():
        ray.init(
            address="local",  # a bare init would join any cluster that runs on this machine
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            object_store_memory=_fitting_store(store_bytes),
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=str(folder),
        )
    _silence()
    try:
        with _watched():
            yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _in_groups_of_their_own() -> Iterator[None]:
    """Ray's processes: what a terminal or a scheduler sends to the driver's group is for the driver, which ends them.

    SIGTERM to all of them would take the servers away from the checkpoint that the driver writes then. There is no
    public way; Ray itself only blocks SIGINT. Its own processes still end with the driver, however that ends.
    """
    try:
        from ray._private import services
    except ImportError:
        services = None
    original = getattr(services, "ConsolePopen", None)
    if original is None:
        yield
        return
    services.ConsolePopen = functools.partial(original, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = original


def _watched() -> AbstractContextManager[None]:
    from cluster.watchdog import ray_watched

    return ray_watched()


def _silence() -> None:
    """The death of a process would print ten lines of advice; whoever watches the run says it in one."""
    import ray._private.worker as internal

    # Ray's own debugger does the same; there is no public way.
    if hasattr(internal, "_worker_logs_enabled"):
        internal._worker_logs_enabled = False


@functools.cache
def _token() -> str:
    """One token for all private clusters of this process: Ray reads it once and keeps it."""
    return secrets.token_hex(32)


def _private(folder: Path) -> dict[str, str]:
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(_token())
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # binds loopback only
        "RAY_ADDRESS": "",
        # What nobody looks at in a private cluster; on two busy cores it would be felt.
        "RAY_enable_metrics_collection": "0",
        "RAY_task_events_report_interval_ms": "0",
        "RAY_raylet_report_resources_period_milliseconds": "1000",
    }


def _fitting_store(wanted: int) -> int:
    """Size of the object store: what is wanted, or what /dev/shm has."""
    wanted = max(128 * _MIB, wanted)
    with contextlib.suppress(OSError):
        free = shutil.disk_usage("/dev/shm").free
        if free < wanted:
            raise ConfigError(
                f"/dev/shm has {free // _MIB} MiB free, the run wants {wanted // _MIB} MiB for tensors between "
                "processes: make it larger (docker: --shm-size), or use fewer workers"
            )
    return wanted


def check_address(address: str) -> None:
    """See whether somebody listens at ``host:port``.

    Raises:
        ConfigError: if nobody does.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"--address {address!r} is not host:port, e.g. 10.0.0.1:6379")
    try:
        # Ray itself would try for 80 to 120 seconds and then end the process.
        socket.create_connection((host, int(port)), timeout=_PROBE_S).close()
    except OSError as error:
        raise ConfigError(f"no Ray head listens at {address} ({error}): start one, or leave --address out") from error


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    old = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    """Hold a lock as long as this process lives: by it, others see that the folder is in use."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _sweep() -> None:
    for folder in Path(tempfile.gettempdir()).glob(_PREFIX + "*"):
        with contextlib.suppress(OSError), (folder / "lock").open("r") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _end_processes_of(folder)
            shutil.rmtree(folder, ignore_errors=True)


def _end_processes_of(folder: Path) -> None:
    """After the kill of a driver some of Ray's processes look for their raylet for a minute."""
    trackers = []
    for pid in _processes_of(folder):
        if _is_tracker(pid):
            trackers.append(pid)
        else:
            _kill(pid)
    # Who is killed leaves named semaphores to its tracker, which takes them away and ends by itself.
    deadline = time.monotonic() + _TRACKERS_S
    while trackers and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
        trackers = [pid for pid in trackers if _is_tracker(pid)]
    for pid in trackers:
        _kill(pid)


def _processes_of(folder: Path) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):  # gone, or another user's
                if os.readlink(entry / "cwd") == str(folder) or os.fsencode(folder) in _command(int(entry.name)):
                    found.append(int(entry.name))
    return found


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def _is_tracker(pid: int) -> bool:
    """Whether it is one of Python's ``multiprocessing``, and has not ended."""
    with contextlib.suppress(OSError):
        return b"multiprocessing.resource_tracker" in _command(pid)
    return False


def _kill(pid: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)
