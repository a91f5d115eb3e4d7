"""Starting ``pushpull`` as a user does, and seeing what is left when it has gone."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PUSHPULL = str(Path(sys.executable).with_name("pushpull"))


def start(*arguments: str, cwd: Path | None = None) -> "subprocess.Popen[str]":
    """A ``pushpull`` process in a session of its own."""
    return subprocess.Popen(
        [PUSHPULL, *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Whoever started the tests in the background may have had Ctrl-C ignored, and a child inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_line(process: "subprocess.Popen[str]", text: str) -> str:
    """Read standard output up to the first line with ``text``."""
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return line
    raise AssertionError(f"the process ended without saying {text!r}: {process.stderr and process.stderr.read()}")


def kill_now(process: "subprocess.Popen[str]") -> None:
    """SIGKILL, without waiting for its output: processes that Ray started hold the pipe for a while."""
    process.kill()
    process.wait(30)
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def ray_folders() -> set[str]:
    """Temporary folders of private Ray clusters."""
    return {str(path) for path in Path(tempfile.gettempdir()).glob("pushpull-*")}


def processes_of(folders: set[str]) -> dict[int, str]:
    """Live processes whose command line names one of the folders."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if any(folder in command for folder in folders):
            found[int(entry.name)] = command
    return found


def end_processes_of(folders: set[str]) -> None:
    """Kill what ``processes_of`` finds."""
    for pid in processes_of(folders):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def gone(folders: set[str], within_s: float = 20.0) -> list[str]:
    """What is left of these clusters after waiting for it to go: processes and folders."""
    deadline = time.monotonic() + within_s
    while True:
        left = [*processes_of(folders).values()] + [folder for folder in folders if Path(folder).exists()]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)


def wait_for(condition: Callable[[], bool], within_s: float = 30.0) -> None:
    """Return once ``condition`` holds.

    Raises:
        AssertionError: if it does not in time.
    """
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.1)


def children(pid: int) -> list[bytes]:
    """Command lines of a process's children."""
    found = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        for child in (thread / "children").read_text().split():
            with contextlib.suppress(OSError):  # it has ended
                found.append(Path(f"/proc/{child}/cmdline").read_bytes())
    return found


def shared_memory() -> set[str]:
    """Names in /dev/shm."""
    return set(os.listdir("/dev/shm"))
