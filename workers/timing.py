"""The eight stages of a step and the time that each costs on the worker's own clock."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

__all__ = ["PHASES", "PhaseTimer", "stage_of", "stage_word"]

PHASES = ("split", "pull", "compute", "reduce", "push", "aggregate", "update", "commit")


class PhaseTimer:
    """Adds up exposed seconds by stage; one step at a time.

    Args:
        on_enter: called with each stage before it begins.
        around: makes what a block of a stage runs in, where its name is to stand in a trace.
    """

    def __init__(
        self,
        on_enter: Callable[[str], object] | None = None,
        around: Callable[[str], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._on_enter = on_enter
        self._around = around
        self._phases = {name: _Phase(self, name) for name in PHASES}

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Book the block's time on ``name``; not inside a block of the same name."""
        return self._phases[name] if self._around is None else self._traced(name, self._around)

    @contextmanager
    def _traced(self, name: str, around: Callable[[str], AbstractContextManager[Any]]) -> Iterator[None]:
        with around(name), self._phases[name]:
            yield

    def enter(self, name: str) -> float:
        """A block of ``name`` begins, at the time that is given back."""
        if self._on_enter is not None:
            self._on_enter(name)
        return time.perf_counter()

    def leave(self, name: str, start: float) -> None:
        """A block of ``name`` is over that began at ``start``."""
        self._seconds[name] += time.perf_counter() - start

    def book(self, seconds: float, name: str) -> None:
        """``seconds`` of ``name`` went by outside of its blocks."""
        self._seconds[name] += seconds

    def move(self, seconds: float, source: str, target: str) -> None:
        """Book ``seconds`` of what stands under ``source`` on ``target``; never more than there is."""
        moved = min(seconds, self._seconds[source])
        self._seconds[source] -= moved
        self._seconds[target] += moved

    def take_ms(self) -> dict[str, float]:
        """Milliseconds by stage since the last call."""
        taken = {name: 1e3 * seconds for name, seconds in self._seconds.items()}
        self._seconds = dict.fromkeys(PHASES, 0.0)
        return taken


class _Phase(AbstractContextManager[None]):
    """One stage's blocks, one after the other; made once, since a step has many and each counts."""

    def __init__(self, timer: PhaseTimer, name: str) -> None:
        self._timer = timer
        self._name = name

    def __enter__(self) -> None:
        self._start = self._timer.enter(self._name)

    def __exit__(self, *_: object) -> None:
        self._timer.leave(self._name, self._start)


def stage_word(step: int, stage: str) -> int:
    """A step and a stage of it as one number."""
    return step * len(PHASES) + PHASES.index(stage)


def stage_of(word: int) -> tuple[int, str]:
    """What ``stage_word`` made a number of."""
    step, index = divmod(word, len(PHASES))
    return step, PHASES[index]
