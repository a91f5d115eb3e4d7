"""What has been pushed to a step that is not committed yet: checked, and told from repetitions."""

from collections.abc import Mapping

import torch
from torch import Tensor

from paramserver.errors import PartitionMismatch, PushRefused, ReplicaMismatch, StaleContribution
from paramserver.integers import IntegerBlock
from paramserver.messages import MicrobatchStats, Push
from paramserver.partition import Partition
from paramserver.reduction import TreeSum, check_node

__all__ = ["OpenStep"]


class OpenStep:
    """Contributions to one step after the other, for some slices.

    Args:
        place: who collects them, for messages.
        partition: of the run.
        num_microbatches: ``M``, the leaves of the canonical tree.
        wanted: microbatches whose contributions come here.
        run: run id and resume count; pushes with another one are refused.
        sums: by slice index, what is held of it.
        counts_integers: whether integer buffers are collected here.
    """

    def __init__(
        self,
        place: str,
        partition: Partition,
        num_microbatches: int,
        wanted: range,
        run: str,
        sums: Mapping[int, TreeSum[Tensor]],
        *,
        counts_integers: bool,
    ) -> None:
        self.generation = 0
        self.run = run
        self._place = place
        self._partition = partition
        self.num_microbatches = num_microbatches
        self._wanted = wanted
        self._sums = sums
        self._counts_integers = counts_integers
        self.open()

    def open(self) -> None:
        """Forget all contributions: their step is committed."""
        for held in self._sums.values():
            held.clear()
        self.stats: dict[int, MicrobatchStats] = {}
        """Rows by microbatch."""
        self.integers = IntegerBlock.pack({})
        """Integer and boolean buffers after a microbatch, on which all agree."""
        self.last_worker: int | None = None
        """Whose contribution came last."""

    def push(self, push: Push, version: int) -> None:
        """Take a contribution in; a repetition is ignored. Nothing is changed if it raises.

        The tensors are read until the step is committed, and never written. A push may hold some of the slices alone;
        the rows and integer buffers of its microbatches come with each.

        Args:
            push: the contribution.
            version: the committed one, to which the open step is the next.

        Raises:
            StaleContribution: an earlier step, generation or run. A repetition of the step just committed is
                answered: transports may deliver twice, and late.
            PushRefused: the step is not open yet.
            PartitionMismatch: a slice that is not here, or has another size or dtype.
            OverlappingContribution: the node is not one of the tree.
            ReplicaMismatch: integer buffers differ from those of another microbatch.
        """
        if (push.run, push.generation, push.step) == (self.run, self.generation, version - 1):
            return
        self.check(push, version)
        if self._counts_integers:
            self._agree(push.integers, push)
        fresh = [self._sums[index].insert(push.node, values) for index, values in push.slices.items()]
        if fresh and not any(fresh):
            return
        if self._counts_integers and push.integers and not self.integers.same(push.integers):
            self.integers = self.integers.updated(IntegerBlock.of(push.integers).snap())
        self.stats.update((row.microbatch, row) for row in push.stats)
        self.last_worker = push.worker

    def check(self, push: Push, version: int) -> None:
        """Raise what ``push`` would of the contribution itself, whatever else was pushed."""
        who = f"push of worker {push.worker} for step {push.step}"
        if push.run != self.run or push.generation < self.generation:
            raise StaleContribution(f"{who} is of run {push.run}, generation {push.generation}, an earlier one")
        if push.step < version:
            raise StaleContribution(f"{who}: {self._place} has committed version {version} already")
        if push.step > version:
            raise PushRefused(f"{who}: {self._place} is at version {version}, the step is not open yet")
        for index, values in push.slices.items():
            if index not in self._sums:
                raise PartitionMismatch(f"{who}: slice {index} is not on {self._place}")
            wanted = self._partition.slices[index].numel
            if values.dtype != torch.float32 or values.shape != (wanted,):
                raise PartitionMismatch(
                    f"{who}: slice {index} is {values.dtype} of shape {tuple(values.shape)}, wanted float32 ({wanted},)"
                )
        if [row.microbatch for row in push.stats] != list(range(push.node.lo, push.node.hi)):
            raise PartitionMismatch(f"{who}: its rows are not those of microbatches [{push.node.lo}, {push.node.hi})")
        check_node(push.node, self.num_microbatches)

    def _agree(self, integers: Mapping[str, Tensor], push: Push) -> None:
        if not self.integers or self.integers.same(integers):
            return
        for name, value in integers.items():
            known = self.integers.get(name, value)
            if not torch.equal(known, value):
                raise ReplicaMismatch(
                    f"buffer {name!r} differs between the microbatches of step {push.step} ({known} and {value}): "
                    "an integer buffer must become the same in every microbatch"
                )

    @property
    def counted(self) -> bool:
        """Whether the rows of all wanted microbatches are known."""
        return len(self.stats) == len(self._wanted)

    def is_whole(self, index: int) -> bool:
        """Whether all wanted contributions to a slice are here."""
        return self._sums[index].held == len(self._wanted)

    @property
    def complete(self) -> bool:
        """Whether everything wanted is here."""
        return self.counted and all(self.is_whole(index) for index in self._sums)

    def missing(self) -> list[int]:
        """Wanted microbatches that some slice still waits for."""
        slices = {index for held in self._sums.values() for index in held.missing(self._wanted)}
        return sorted(slices | (set(self._wanted) - self.stats.keys()))
