"""The eight stages of a step and the time that each costs on the worker's own clock."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["PHASES", "PhaseTimer"]

PHASES = ("split", "pull", "compute", "reduce", "push", "aggregate", "update", "commit")


class PhaseTimer:
    """Adds up exposed seconds by stage; one step at a time."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Book the block's time on ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

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
