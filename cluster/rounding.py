"""Who rounds what on its way through Ray: residuals are dealt out at the start and collected for checkpoints."""

from collections.abc import Collection, Iterable
from typing import NamedTuple

from cluster.config import ClusterConfig
from paramserver.config import WirePrecision
from paramserver.partition import Partition
from paramserver.reduction import Node, maximal_nodes
from paramserver.residuals import Residuals, SliceResiduals, residuals_by_key, residuals_by_slice
from workers.report import StepReport

__all__ = ["Rounding", "Roundings"]


class Rounding(NamedTuple):
    """What an actor needs to know to round what it sends."""

    precision: WirePrecision
    residuals: SliceResiduals
    """What an earlier life of the run left over of the tree nodes that the actor sends."""
    held_versions: tuple[int, ...]
    """Versions whose residuals a checkpoint will ask for."""


class Roundings:
    """The roundings of one run; with fp32 there are none.

    Args:
        config: settings of all actors.
        partition: of the run.
        residuals: what the checkpoint has that the run goes on from.
    """

    def __init__(self, config: ClusterConfig, partition: Partition, residuals: Residuals) -> None:
        self._config = config
        self._partition = partition
        self.active = config.wire_precision != "fp32"
        self._waiting = residuals_by_slice(partition, residuals) if self.active else {}
        """What the checkpoint has, until somebody takes it up."""
        self._reported: dict[int, SliceResiduals] = {}

    def deal(self, run: range, servers: Collection[int]) -> Rounding | None:
        """For whoever sends these microbatches to these servers: it takes up what is owed of its tree nodes."""
        if not self.active:
            return None
        nodes = maximal_nodes(run.start, run.stop, self._config.worker.plan.microbatches)
        own = [
            (index, node)
            for index, node in self._waiting
            if node in nodes and self._partition.slices[index].server in servers
        ]
        taken_up = {place: self._waiting.pop(place) for place in own}
        return Rounding(self._config.wire_precision, taken_up, self._config.held_versions)

    @property
    def dropped(self) -> list[Node]:
        """Tree nodes of which nobody took up what the checkpoint has, once everything is dealt."""
        return sorted({node for _, node in self._waiting})

    def keep(self, report: StepReport) -> None:
        """Keep the workers' residuals of a step until ``collect`` asks for them."""
        if report.residuals:
            self._reported[report.step] = report.residuals

    def collect(self, version: int, relays: Iterable[SliceResiduals]) -> Residuals:
        """What workers reported and relays gave of a version, put together."""
        found = [self._reported.pop(version, {}), *relays]
        return residuals_by_key(self._partition, {place: value for part in found for place, value in part.items()})
