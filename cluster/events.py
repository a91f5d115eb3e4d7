"""Who belongs to a run, and what happens to them, for whoever watches it. Imports neither torch nor ray."""

import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

__all__ = ["Event", "Kind", "Process"]

Kind = Literal["lost", "spare", "replaced", "joined", "left", "recovered", "restored", "dropped"]


class Process(NamedTuple):
    """A live process of a run, as processes.json has it."""

    role: str
    index: int  # type: ignore[assignment]  # tuple has a method of that name, which nobody calls here
    pid: int
    node: str


@dataclass(frozen=True)
class Event:
    """One thing that happened."""

    kind: Kind
    text: str
    """One line for the terminal."""
    role: str | None = None
    number: int | None = None
    pid: int | None = None
    host: str | None = None
    step: int | None = None
    """The step that was open."""
    seconds: float | None = None
    """``recovered``: from the loss until the next step was committed."""
    time: float = field(default_factory=time.time)

    def row(self) -> dict[str, Any]:
        """A row of events.jsonl."""
        return {name: value for name, value in asdict(self).items() if value is not None}
