"""Who is alive and who computes which microbatches: starts the actors, collects their reports, replaces the lost.

It is not on the path of a step: workers run freely and the servers' commit is their barrier. It acts when the
membership changes. Every change begins a new generation: servers forget what was pushed to the open step, microbatches
are dealt anew, and workers go on from the committed version. Since a version does not depend on who computed it, the
bits are those of a run that nobody disturbed.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import ray
import ray.exceptions

from cluster.causes import cause_of, lost
from cluster.config import ClusterConfig
from cluster.crew import Crew
from cluster.events import Event, Process
from cluster.failure_detector import FailureDetector
from cluster.members import Member
from cluster.placement import resources
from cluster.reports import Merger
from models.registry import TaskSource
from paramserver.errors import PushPullError, ServerLost, StaleContribution, StepTimeout, VersionGone, WorkerLost
from paramserver.partition import Partition
from paramserver.state import State
from workers.minibatch import MinibatchPlan
from workers.report import EvaluationReport, StepReport

__all__ = ["Coordinator"]

_POLL_S = 0.1
_LEAST_DEADLINE_S = 30.0
_DEADLINE_STEPS = 10
_ANSWER_S = 5.0
_MAX_ATTEMPTS = 8
"""Recoveries in a row that fail."""
_MAX_DEATHS = 3
"""Of the same worker or server in one step."""


class Coordinator:
    """One parameter-server run on a Ray cluster that was started already; use it as a context manager.

    Args:
        source: the task.
        config: settings of all actors.
        partition: of the task's model.
        state: what the run starts from.
        restore: the newest state that was saved, for when a server is lost with its memory.
        on_event: called with whatever happens to the membership, and with what runs then.
    """

    def __init__(
        self,
        source: TaskSource,
        config: ClusterConfig,
        partition: Partition,
        state: State,
        restore: Callable[[], State] | None = None,
        on_event: Callable[[Event, list[Process]], None] = lambda *_: None,
    ) -> None:
        self._config = config
        self._on_event: Callable[[Event], None] = lambda event: on_event(event, self.processes)
        self._crew = Crew(source, config, partition, state, restore or (lambda: state), self._on_event)
        self._detector = FailureDetector(self._crew.members, notes=config.transport != "ray")
        self._streams: dict[Any, tuple[int, Member]] = {}
        self._merger = Merger(MinibatchPlan(config.worker.plan, config.num_samples), state.version)
        self._quiet_since = time.monotonic()
        self._step_s: deque[float] = deque(maxlen=50)
        self._stop_requested: Callable[[], bool] = lambda: False
        self._stopping = False
        self._leaving = False
        self._died_at = -1
        """Version from which the run went on after the last loss."""
        self._least = 0
        """Workers that the next generation waits for."""
        self._failure: WorkerLost | None = None
        """Why the run ends, once what is committed has been told."""

    def __enter__(self) -> "Coordinator":
        return self

    def __exit__(self, *_: object) -> None:
        self._streams.clear()
        self._crew.close()

    @property
    def notices(self) -> list[str]:
        """What the user should know of how the run is spread, once it is started."""
        return self._crew.notices

    @property
    def processes(self) -> list[Process]:
        """Whatever runs now."""
        return self._crew.members.processes()

    def start(self) -> None:
        """Wait until every actor has its place and its model, and see that all devices are of one kind.

        Raises:
            WorkerLost, ServerLost: if an actor died or raised.
            StepTimeout: if an actor found no place in time.
            ReplicaMismatch: if devices differ in what changes bits.
        """
        deadline = time.monotonic() + self._config.start_timeout_s
        for member in self._crew.begin():
            self._await(member, deadline)
        self._crew.settle()
        try:
            self._crew.servers.open()
            self._crew.group()
        except ray.exceptions.RayError as error:
            raise cause_of(error) or ServerLost(f"a server died at the start: {error}") from None

    def _await(self, member: Member, deadline: float) -> None:
        try:
            self._crew.members.await_place(member, deadline - time.monotonic())
        except ray.exceptions.GetTimeoutError:
            raise StepTimeout(
                f"{member} was not started within {self._config.start_timeout_s:.0f} s: "
                f"the cluster has {resources(ray.cluster_resources())}, free are {resources(ray.available_resources())}"
            ) from None
        except ray.exceptions.RayError as error:
            raise cause_of(error) or lost(member) from None

    # -- the run -----------------------------------------------------------------------------------------------------

    def run(self, stop_requested: Callable[[], bool]) -> Iterator[StepReport | EvaluationReport]:
        """Let the workers train; gives each step once all have reported it, and each evaluation, in order of steps.

        Args:
            stop_requested: asked often; once it says so, the run ends with the version that is committed next.

        Raises:
            WorkerLost, ServerLost, StepTimeout: naming who, where nobody can take the place of what was lost.
            Exception: what a worker raised, such as ``DataError``.
        """
        self._stop_requested = stop_requested
        self._deal()
        while True:
            for whole in self._merger.take():
                self._note(whole)
                yield whole
                self._quiet_since = time.monotonic()  # whoever reads us may have been writing a checkpoint
            if not self._streams and self._failure is not None:
                raise self._failure
            if not self._streams and self._merger.stopped:
                return
            self._turn()

    def _turn(self) -> None:
        """Take in whatever has come since the last turn, and act on it."""
        if not self._streams:
            self._recover()
            return
        self._ask_for_changes()
        if self._failure is None and self._crew.bury_fallen(self._merger.emitted + 1):
            self._recover()
            return
        ready, _ = ray.wait([*self._streams, *self._crew.starting], num_returns=1, timeout=_POLL_S, fetch_local=False)
        for reference in ready:
            if reference in self._streams:
                self._read(reference)
            else:
                self._crew.take_in(reference)
        if not ready:
            self._check_quiet()

    def _note(self, whole: StepReport | EvaluationReport) -> None:
        if not isinstance(whole, StepReport):
            return
        self._crew.roundings.keep(whole)
        if whole.step_ms == whole.step_ms:  # not NaN: somebody lives to tell
            self._step_s.append(1e-3 * whole.step_ms)
        if (lost_at := self._crew.members.lost_at) is not None and whole.commit.generation == self._crew.generation:
            self._crew.members.lost_at = None
            seconds = time.monotonic() - lost_at
            text = f"step {whole.step} was committed {seconds:.1f} s after the loss"
            self._on_event(Event("recovered", text, step=whole.step, seconds=seconds))
        if (workers := self._config.faults.scaling.get(whole.step)) is not None:
            self.scale(workers, wait=True)
        self._crew.begin_spares()

    def _ask_for_changes(self) -> None:
        if not self._stopping and self._stop_requested():
            self._stopping = True
            self._crew.servers.request("request_stop")
        if self._crew.wants_change and not self._leaving:
            self._leaving = True
            self._crew.servers.request("request_leave")

    def scale(self, workers: int, *, wait: bool = False) -> None:
        """Change how many workers there should be; who comes or goes does so between two steps.

        Args:
            workers: how many.
            wait: whether the run waits for those who come, as a scenario does that is to be the same every time.
        """
        self._crew.target = workers
        self._crew.ask_for_workers()
        if wait and not self._leaving:
            self._leaving = True
            self._least = workers
            self._crew.servers.request("request_leave")

    def _deal(self) -> None:
        """Give each worker its microbatches and let it go on from the committed version."""
        crew, version = self._crew, self._crew.servers.version
        plan = self._config.worker.plan
        self._merger.learn(crew.servers.commits)
        ended = version == plan.steps or (crew.servers.last is not None and crew.servers.last.stop)
        evaluate = self._owes_evaluation(version, ended=ended)
        seats = crew.dealt if evaluate or not ended else []
        self._merger.begin(crew.generation, version, {dealt.seat.number: dealt.run for dealt in seats})
        for member, seat, _, addresses, rounding in seats:
            stream = member.actor.run.options(num_returns="streaming").remote(
                seat, crew.servers.actors, addresses, rounding, evaluate=evaluate, train=not ended
            )
            self._streams[stream] = (crew.generation, member)
        if self._stopping and not ended:
            crew.servers.request("request_stop")
        self._leaving = False
        self._least = 0
        self._quiet_since = time.monotonic()

    def _owes_evaluation(self, version: int, *, ended: bool) -> bool:
        worker = self._config.worker
        due = ended or (worker.eval_every and version % worker.eval_every == 0)
        # Reports of it may be on their way still; then it is done twice and told once.
        return bool(worker.evaluate and due and version > self._merger.evaluated)

    def _read(self, stream: Any) -> None:
        generation, member = self._streams[stream]
        try:
            report = ray.get(next(stream))
        except StopIteration:
            self._end(stream)
            return
        except ray.exceptions.RayError as error:
            self._end(stream)
            self._hear(error, generation, member)
            return
        self._quiet_since = time.monotonic()
        self._merger.add(generation, member.number, report)

    def _end(self, stream: Any) -> None:
        generation, member = self._streams.pop(stream)
        self._merger.ended(generation, member.number)

    def _hear(self, error: ray.exceptions.RayError, generation: int, member: Member) -> None:
        """A worker's run has ended with an error: is it a matter of the membership, or the run's?"""
        cause = cause_of(error)
        if cause is None:
            self._crew.bury(member, "died", self._merger.emitted + 1)
        if generation == self._crew.generation:  # what is wrong with the run itself will be wrong again
            if cause is not None and not isinstance(cause, ServerLost | StaleContribution | StepTimeout):
                raise cause
            if isinstance(cause, StepTimeout):
                self._find_culprit(cause)
            self._recover()

    def _check_quiet(self) -> None:
        quiet_s = time.monotonic() - self._quiet_since
        if self._failure is not None and quiet_s > _ANSWER_S:
            raise self._failure
        if quiet_s > self._deadline_s():
            self._find_culprit(StepTimeout(f"nothing was heard for {quiet_s:.0f} s, --step-timeout"))
            self._recover()

    def _deadline_s(self) -> float:
        limit = self._config.step_timeout_s
        if limit is None:
            limit = max(_LEAST_DEADLINE_S, _DEADLINE_STEPS * statistics.median(self._step_s or [0.0]))
        # The first step builds caches; an evaluation takes as long as it takes, within reason.
        slow = not self._step_s or (self._merger.emitted > self._merger.evaluated and self._config.worker.evaluate)
        return limit + (self._config.start_timeout_s if slow else 0.0)

    # -- recovery ----------------------------------------------------------------------------------------------------

    def _find_culprit(self, error: StepTimeout) -> None:
        """Somebody has kept all others waiting: end him.

        Raises:
            StepTimeout: if nobody can be found.
        """
        runs = {dealt.member: dealt.run for dealt in self._crew.dealt}
        culprits = self._detector.culprits(runs, str(error))
        for member, how in culprits:
            self._crew.bury(member, how, self._merger.emitted + 1)
        if not culprits:
            raise error

    def _recover(self) -> None:
        """Go on from the committed version with whoever is alive."""
        for left in reversed(range(_MAX_ATTEMPTS)):
            try:
                self._crew.bury_fallen(self._merger.emitted + 1)
                self._check_deaths()
                self._crew.ensure_workers(self._least)
                self._crew.group()
                self._forget_deaths()
                self._deal()
                self._crew.ask_for_workers()  # not before: what starts takes its time from what all wait for
                return
            except WorkerLost as error:
                self._wind_up(error)
                return
            except (ServerLost, StaleContribution, StepTimeout):
                if not left:
                    raise

    def _check_deaths(self) -> None:
        """Whatever kills the same member again and again will kill the next one, too."""
        for (role, number), count in self._crew.members.deaths.items():
            if count > _MAX_DEATHS:
                raise WorkerLost(
                    f"{role} {number} died {count} times in step {self._merger.emitted + 1}: "
                    "see why (its log, memory, the samples of the step), then resume with --resume"
                )

    def _forget_deaths(self) -> None:
        """Those in earlier steps do not count; steps that are replayed are not reported, but committed all the same."""
        deaths, version = self._crew.members.deaths, self._crew.servers.version
        if version != self._died_at:
            self._died_at = version
            deaths.update({who: 1 - count for who, count in deaths.items()})

    def _wind_up(self, error: WorkerLost) -> None:
        """Nobody can go on: the run ends with the last committed version, of which all is told."""
        try:
            self._crew.dismiss()
        except PushPullError:
            raise error from None
        self._merger.learn(self._crew.servers.commits)
        self._merger.begin(self._crew.generation, self._crew.servers.version, {})
        self._failure = error
        self._quiet_since = time.monotonic()

    # -- reading -----------------------------------------------------------------------------------------------------

    def state(self, version: int, *, release: bool = False) -> State:
        """A copy of everything at ``version``: the last one, or one that is held (and is given free).

        If it was lost with its servers, it is waited for until the steps since the last checkpoint are replayed.
        """
        left = _MAX_ATTEMPTS
        while True:
            try:
                return self._crew.state(version, release=release)
            except ServerLost:
                left -= 1
                if not left:
                    raise
                self._recover()
            except VersionGone:
                if self._crew.servers.version >= version or self._failure is not None:
                    raise
                self._turn()
