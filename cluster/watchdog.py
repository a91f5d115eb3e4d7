"""Sees the end of Ray on the driver's own node: Ray itself would let every call wait for ever."""

import contextlib
import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import ray

from paramserver.errors import ServerLost

__all__ = ["ray_watched"]


@contextmanager
def ray_watched() -> Iterator[None]:
    """Ends the block with an error if the raylet of this node dies; Ray must have been started.

    Raises:
        ServerLost: naming it.
    """
    pid = _raylet(ray.get_runtime_context().get_node_id())
    if pid is None:
        yield
        return
    lost, over = threading.Event(), os.eventfd(0, os.EFD_CLOEXEC)
    process = os.pidfd_open(pid)

    def watch() -> None:
        ready, _, _ = select.select([process, over], [], [])
        if over not in ready:
            lost.set()
            if old is not None:
                signal.pthread_kill(main, signal.SIGUSR2)

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt  # the one exception that comes out of whatever Ray is doing

    main, old = threading.get_ident(), None
    with contextlib.suppress(ValueError):  # not in the main thread: then the run's own deadlines must do
        old = signal.signal(signal.SIGUSR2, interrupt)
    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    except BaseException as error:
        if lost.is_set():
            raise ServerLost(
                f"Ray is gone on this node (raylet, pid {pid}): start it again, and go on with --resume"
            ) from error
        raise
    finally:
        os.eventfd_write(over, 1)
        thread.join()
        if old is not None:
            signal.signal(signal.SIGUSR2, old)
        os.close(process)
        os.close(over)


def _raylet(node: str) -> int | None:
    """The process that is a node to Ray, if it runs on this machine."""
    wanted = f"--node_id={node}".encode()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            arguments = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
            if wanted in arguments and arguments[0].endswith(b"/raylet"):
                return int(entry.name)
    return None
