"""The tree of errors of a run.

::

    PushPullError
    ├── ConfigError               a setting that cannot work (exit code 2)
    ├── PushRefused               a push that a server will not take
    │   ├── PartitionMismatch     other keys, sizes or dtype than the server's
    │   ├── StaleContribution     a step that is already committed, or an older generation
    │   └── OverlappingContribution  neither covers what is held nor is disjoint from it
    ├── VersionGone               a version asked for that is no longer (or never was) held
    ├── NonFiniteGradient         NaN or infinity in a summed gradient
    ├── ReplicaMismatch           participants that should hold the same do not
    ├── CorruptTransfer           what came over a wire is not what was sent
    ├── StepTimeout               a wait that ran past its deadline
    ├── WorkerLost                a worker died or raised
    ├── ServerLost                a server died or raised
    └── CheckpointError           a checkpoint that is missing, torn or foreign

Every one survives pickling with its attributes, so that it can be raised in one process and shown by another.
"""

from typing import Any

__all__ = [
    "CheckpointError",
    "ConfigError",
    "CorruptTransfer",
    "NonFiniteGradient",
    "OverlappingContribution",
    "PartitionMismatch",
    "PushPullError",
    "PushRefused",
    "ReplicaMismatch",
    "ServerLost",
    "StaleContribution",
    "StepTimeout",
    "VersionGone",
    "WorkerLost",
]


class PushPullError(Exception):
    """Root of the tree; ``message`` is one line that names the thing and the remedy."""

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.details)


def _rebuild(cls: type[PushPullError], message: str, details: dict[str, Any]) -> PushPullError:
    return cls(message, **details)


class ConfigError(PushPullError, ValueError):
    """A setting that cannot work, found before anything is started or written."""


class PushRefused(PushPullError):
    """A push that a server will not take."""


class PartitionMismatch(PushRefused):
    """A push whose slices, sizes or dtype are not the server's."""


class StaleContribution(PushRefused):
    """A push for a step that is already committed, or from an older generation."""


class OverlappingContribution(PushRefused):
    """A push of a tree node that neither covers what is held nor is disjoint from it."""


class VersionGone(PushPullError):
    """A version that is no longer, or not yet, in memory."""


class NonFiniteGradient(PushPullError):
    """NaN or infinity in the summed gradient; ``details`` has ``key`` and ``step``."""


class ReplicaMismatch(PushPullError):
    """Participants that should hold the same values do not; the first key is named."""


class CorruptTransfer(PushPullError):
    """What came over a wire is not what was sent; the message names the slice."""


class StepTimeout(PushPullError):
    """A wait ran past its deadline; the message names who was waited for, and the knob."""


class WorkerLost(PushPullError):
    """A worker died or raised; ``details`` has ``worker``."""


class ServerLost(PushPullError):
    """A server died or raised; ``details`` has ``server``."""


class CheckpointError(PushPullError):
    """A checkpoint that is missing, torn or from another run."""
