"""The seam between the training loop and how gradients become the next version."""

from contextlib import AbstractContextManager
from typing import Protocol

from torch import nn

from models.task import Metric
from paramserver.messages import Commit
from workers.counted import Counted
from workers.timing import PhaseTimer

__all__ = ["Backend"]


class Backend(Protocol):
    """What one worker does around its forward and backward passes; called in the order of the methods."""

    version: int
    """The version that the next ``pull`` takes."""
    module: nn.Module
    """What a task's loss is called with: the replica's model, or a wrapper of it."""

    def pull(self, timer: PhaseTimer) -> None:
        """Stage 2: put the current version into the replica."""

    def microbatch(self, index: int, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of microbatch ``index``, which starts from the pulled buffers.

        ``last`` says that no non-empty microbatch of this worker follows in this step.
        """

    def forwarded(self, counted: Counted) -> None:
        """Between forward and backward of a microbatch, whose buffers are final, with what it counted."""

    def contribute(self, counted: Counted, timer: PhaseTimer) -> None:
        """Stage 4, after each backward: take the gradients out of the replica; empty microbatches count as zero."""

    def push(self, timer: PhaseTimer) -> None:
        """Stage 5: hand over what is left of this worker's sums."""

    def ahead(self) -> AbstractContextManager[None] | None:
        """Between ``push`` and ``wait``: around the forward pass of the next step's first microbatch, begun early.

        None where that pass must wait for the commit. ``pull`` and ``microbatch`` follow as ever, the latter around the
        backward pass alone.
        """

    def wait(self, timer: PhaseTimer) -> Commit:
        """Stages 6 to 8: wait for the next version. Between ``push`` and this the worker may do other things."""

    def merge_metric(self, metric: Metric) -> Metric | None:
        """Merge the workers' parts of an evaluation; None where another process (or nobody here) has the result."""

    def mean_phases(self, phases_ms: dict[str, float]) -> dict[str, float]:
        """Mean over workers, where workers see each other; else what is given."""

    def note(self, step: int, stage: str) -> None:
        """The worker enters a stage of step ``step``, from 1: leave word of it where others look if it is late."""

    def close(self) -> None:
        """Give everything back."""
