"""What happens to the membership of a run, for whoever watches it."""

import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

__all__ = ["Event"]

Kind = Literal["lost", "replaced", "joined", "left", "recovered", "restored", "dropped"]


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
