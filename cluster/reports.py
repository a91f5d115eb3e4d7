"""Puts the workers' reports together: each step once, in order, whoever died before it could report."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from paramserver.messages import Commit
from workers.minibatch import MinibatchPlan
from workers.report import EvaluationReport, LedgerRow, StepReport, merge_evaluations, merge_steps
from workers.timing import PHASES

__all__ = ["Merger"]

_UNKNOWN = float("nan")


@dataclass
class _Generation:
    """What the workers of one membership report."""

    number: int
    version: int
    """From which they went on."""
    runs: Mapping[int, range]
    """Microbatches by worker."""
    live: set[int]
    """Workers from which reports may still come."""
    steps: dict[int, dict[int, StepReport]] = field(default_factory=dict)
    evaluations: dict[int, dict[int, EvaluationReport]] = field(default_factory=dict)


class Merger:
    """Merges reports of several generations of workers.

    A step is whole once everybody who is alive has reported it. What only the dead could have reported is made up from
    the servers' commits and from the plan: who computed what is known beforehand.

    Args:
        plan: the run's minibatches.
        version: what the run starts from.
    """

    def __init__(self, plan: MinibatchPlan, version: int) -> None:
        self._plan = plan
        self._generations: list[_Generation] = []
        self._commits: dict[int, Commit] = {}
        self.emitted = version
        """The last step that was given out."""
        self.stopped = False
        """Whether that one was the run's last."""
        self.evaluated = version
        """The last version whose evaluation was given out."""

    def begin(self, generation: int, version: int, runs: Mapping[int, range]) -> None:
        """Workers go on from ``version``, each with its run of microbatches."""
        self._generations.append(_Generation(generation, version, runs, set(runs)))

    def learn(self, commits: Iterable[Commit]) -> None:
        """What servers say of steps, for those that nobody reports."""
        self._commits.update((commit.version, commit) for commit in commits if commit.version > self.emitted)

    def add(self, generation: int, number: int, report: StepReport | EvaluationReport) -> None:
        """Take in what a worker reports."""
        held = self._find(generation)
        if held is None:
            return
        if isinstance(report, StepReport):
            held.steps.setdefault(report.step, {})[number] = report
        else:
            held.evaluations.setdefault(report.step, {})[number] = report

    def ended(self, generation: int, number: int) -> None:
        """Nothing more comes from this worker in this generation."""
        if held := self._find(generation):
            held.live.discard(number)

    def _find(self, generation: int) -> _Generation | None:
        return next((held for held in self._generations if held.number == generation), None)

    def live(self, generation: int) -> set[int]:
        """Workers of a generation from which reports may still come."""
        held = self._find(generation)
        return set() if held is None else set(held.live)

    def take(self) -> Iterator[StepReport | EvaluationReport]:
        """Whatever is whole by now, in order."""
        while self._generations:
            head = self._generations[0]
            while (whole := self._next(head)) is not None:
                yield whole
            if head.live or len(self._generations) == 1:
                return
            yield from self._rest(head, self._generations[1].version)
            self._generations.pop(0)

    def _next(self, head: _Generation) -> StepReport | EvaluationReport | None:
        parts = head.evaluations.get(self.emitted, {})
        if parts and self.emitted > self.evaluated and len(parts) == len(head.runs):
            self.evaluated = self.emitted
            return merge_evaluations(list(parts.values()))
        for step in [step for step in head.steps if step <= self.emitted]:
            del head.steps[step]  # replayed from a checkpoint
        reports = head.steps.get(self.emitted + 1)
        if not reports or not head.live <= reports.keys():
            return None
        return self._emit(head, self.emitted + 1)

    def _rest(self, head: _Generation, version: int) -> Iterator[StepReport]:
        """What nobody lives to report: the commits before those of the next generation."""
        while self.emitted < version:
            yield self._emit(head, self.emitted + 1)

    def _emit(self, head: _Generation, step: int) -> StepReport:
        reports = list(head.steps.pop(step, {}).values())
        if reports:
            whole = merge_steps(reports)
            known = {row.microbatch for row in whole.ledger}
        else:
            whole, known = self._made_up(step), set()
        rows = [row for row in self._ledger(head, step) if row.microbatch not in known]
        self.emitted = step
        self.stopped = whole.stop
        self._commits = {version: commit for version, commit in self._commits.items() if version > step}
        return whole.with_rows(rows)

    def _made_up(self, step: int) -> StepReport:
        commit = self._commits.get(step) or Commit(step, (), _UNKNOWN)
        return StepReport(
            step=step,
            epoch=self._plan.epoch(step - 1),
            worker=-1,
            commit=commit,
            ledger=(),
            step_ms=_UNKNOWN,
            phases_ms=dict.fromkeys(PHASES, _UNKNOWN),
            stop=commit.stop or step == self._plan.config.steps,
        )

    def _ledger(self, head: _Generation, step: int) -> Iterator[LedgerRow]:
        microbatches = self._plan.microbatches(step - 1)
        for number, run in head.runs.items():
            for index in run:
                yield LedgerRow(index, number, microbatches[index])
