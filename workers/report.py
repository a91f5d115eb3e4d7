"""What workers say of committed steps and of evaluations, and how the reports of several are put together."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from models.task import Metric
from paramserver.messages import Commit
from paramserver.residuals import SliceResiduals
from workers.timing import PHASES

__all__ = ["EvaluationReport", "LedgerRow", "StepReport", "merge_evaluations", "merge_steps"]


class LedgerRow(NamedTuple):
    """Which samples one microbatch had, and who computed it."""

    microbatch: int
    worker: int
    samples: list[int]


@dataclass(frozen=True)
class StepReport:
    """A committed step, as one worker or all of them saw it."""

    step: int
    """Number of the step, from 1: the version it committed."""
    epoch: int
    """Epoch of its samples, from 0."""
    worker: int
    """Who reports."""
    commit: Commit
    """What the servers say of it."""
    ledger: tuple[LedgerRow, ...]
    """Rows of the microbatches this process knows of."""
    step_ms: float
    """From the pull to the commit."""
    phases_ms: dict[str, float]
    """Exposed time by stage."""
    stop: bool
    """Whether this was the last step of this process."""
    residuals: SliceResiduals = field(default_factory=dict)
    """What rounding has left over in this process, where a checkpoint is due of this version."""

    def with_rows(self, rows: Sequence[LedgerRow]) -> "StepReport":
        """This report with further rows of its ledger."""
        return replace(self, ledger=tuple(sorted((*self.ledger, *rows)))) if rows else self

    @property
    def loss(self) -> float:
        """Mean loss of the minibatch: float64 sums in microbatch order; a weight below 1 counts as 1."""
        total = weight = 0.0
        for row in self.commit.stats:
            total += row.loss
            weight += row.weight
        return total / max(1.0, weight)

    @property
    def samples(self) -> int:
        """Samples of the minibatch."""
        return sum(row.samples for row in self.commit.stats)


@dataclass(frozen=True)
class EvaluationReport:
    """An evaluation, or one worker's part of it."""

    step: int
    """The version that was evaluated."""
    worker: int
    metric: Metric
    seconds: float


def merge_steps(reports: Sequence[StepReport]) -> StepReport:
    """One report of a step out of all workers': ledger rows in order, times as means."""
    ordered = sorted(reports, key=lambda report: report.worker)
    phases = {name: sum(report.phases_ms[name] for report in ordered) / len(ordered) for name in PHASES}
    return replace(
        ordered[0],
        ledger=tuple(sorted(row for report in ordered for row in report.ledger)),
        step_ms=sum(report.step_ms for report in ordered) / len(ordered),
        phases_ms=phases,
        residuals={place: value for report in ordered for place, value in report.residuals.items()},
    )


def merge_evaluations(reports: Sequence[EvaluationReport]) -> EvaluationReport:
    """The whole evaluation out of the workers' parts."""
    first, *others = sorted(reports, key=lambda report: report.worker)
    for other in others:
        first.metric.merge(other.metric)
    return replace(first, seconds=max(report.seconds for report in reports))
