"""SIGTERM ends a run at the next step with a checkpoint; Ctrl-C ends it at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["StopFlag", "stop_on_sigterm"]


class StopFlag:
    """Whether SIGTERM came."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self) -> bool:
        """The flag, as the training loop asks for it."""
        return self.requested


@contextmanager
def stop_on_sigterm() -> Iterator[StopFlag]:
    """Take over SIGTERM for the block. Enter it after Ray was started: Ray installs a handler of its own."""
    flag = StopFlag()

    def handle(_signal: int, _frame: FrameType | None) -> None:
        flag.requested = True

    try:
        old = signal.signal(signal.SIGTERM, handle)
    except ValueError:  # not in the main thread: somebody else decides about signals there
        yield flag
        return
    try:
        yield flag
    finally:
        signal.signal(signal.SIGTERM, old)
