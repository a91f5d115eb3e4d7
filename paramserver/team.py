"""Threads that share a piece of work with whoever asks for it."""

import ctypes
import os
import threading
from collections.abc import Callable

__all__ = ["Team"]


class Team:
    """``size`` threads, of which one is the caller's own; for one caller at a time, who is not interrupted in it.

    Helpers keep off the core on which the caller runs: a kernel that wakes a thread likes to put it where it was woken
    from, and moves what has just run there away only after half a millisecond, which is all that there is to do.

    Args:
        size: how many work.
        name: of the threads.
    """

    def __init__(self, size: int, name: str) -> None:
        self._work: Callable[[int], None] = _nothing
        self._error: BaseException | None = None
        self._closed = False
        self._starts = [threading.Lock() for _ in range(size - 1)]
        self._ends = [threading.Lock() for _ in range(size - 1)]
        for lock in (*self._starts, *self._ends):
            lock.acquire()
        self._threads = [
            threading.Thread(target=self._help, args=(index,), name=f"{name}-{index + 1}", daemon=True)
            for index in range(size - 1)
        ]
        self._cores = _cores() if size > 1 else frozenset()
        self._kept_off: int | None = None
        for thread in self._threads:
            thread.start()

    def run(self, work: Callable[[int], None]) -> None:
        """Call ``work`` with 0 here and with 1, 2, ... in the helpers; returns once all have returned.

        Raises:
            BaseException: what one of them raised.
        """
        if not self._threads:
            work(0)
            return
        self._keep_off()
        self._work, self._error = work, None
        for start in self._starts:
            start.release()
        try:
            work(0)
        finally:
            for end in self._ends:
                end.acquire()
            self._work = _nothing
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _help(self, index: int) -> None:
        while True:
            self._starts[index].acquire()
            if self._closed:
                return
            try:
                self._work(index + 1)
            except BaseException as error:
                self._error = error
            self._ends[index].release()

    def _keep_off(self) -> None:
        core = _this_core()
        others = self._cores - {core}
        if core == self._kept_off or not others:
            return
        self._kept_off = core
        for thread in self._threads:
            try:
                os.sched_setaffinity(thread.native_id or 0, others)
            except OSError:  # the cores of this process have changed
                self._cores = frozenset()

    def close(self) -> None:
        """End the helpers; ``run`` works alone then."""
        self._closed = True
        for start in self._starts:
            start.release()
        for thread in self._threads:
            thread.join()
        self._threads, self._starts, self._ends = [], [], []


def _nothing(_: int) -> None: ...


def _cores() -> frozenset[int]:
    """Those that this process may use; empty where that cannot be asked."""
    if not hasattr(os, "sched_getaffinity") or _this_core() < 0:
        return frozenset()
    return frozenset(os.sched_getaffinity(0))


def _this_core() -> int:
    return int(_sched_getcpu()) if _sched_getcpu is not None else -1


_sched_getcpu: Callable[[], int] | None = getattr(ctypes.CDLL(None), "sched_getcpu", None)  # glibc's
