"""Who computes: which workers there are, and what each of them gets, in one generation after another."""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import ray
import ray.exceptions

from cluster.config import ClusterConfig, Seat
from cluster.events import Event
from cluster.members import Member, Members
from cluster.placement import check_room
from cluster.relays import Relays
from cluster.rounding import Rounding, Roundings
from cluster.servers import Servers
from cluster.starter import Starter
from models.registry import TaskSource
from paramserver.errors import ReplicaMismatch, WorkerLost
from paramserver.partition import Partition
from paramserver.state import State
from paramserver.transport.channel import Address
from workers.minibatch import deal_runs

__all__ = ["Crew", "Dealt"]

_START_TRIES = 3
"""How often in a row a replacement or a spare may die before it has had work."""
_ROOM_POLL_S = 1.0
"""Between two looks at whether the cluster has room for a spare."""


class Dealt(NamedTuple):
    """What a worker gets for a generation."""

    member: Member
    seat: Seat
    run: range
    addresses: dict[int, Address]
    """Where it reaches servers by shared memory; empty if Ray carries everything."""
    rounding: Rounding | None


class Crew:
    """See the module; ``Coordinator`` decides what is done when.

    Args:
        source: the task.
        config: settings of all actors.
        partition: of the task's model.
        state: what the run starts from.
        restore: the newest state that was saved.
        on_event: called with whatever happens.
    """

    def __init__(
        self,
        source: TaskSource,
        config: ClusterConfig,
        partition: Partition,
        state: State,
        restore: Callable[[], State],
        on_event: Callable[[Event], None],
    ) -> None:
        check_room(config)
        self._config = config
        self._state: State | None = state
        self.roundings = Roundings(config, partition, state.residuals)
        self._starter = Starter(source, config, partition, replace(state, values={}, optimizer={}, residuals={}))
        self.members = Members(on_event)
        self.servers = Servers(config, partition, self._starter, self.members, state.version, restore)
        self._relays = Relays(config, self._starter, self.members, self.servers, self.roundings)
        self.target = config.worker.num_workers
        """How many workers there should be."""
        self.starting: dict[Any, tuple[Member, float]] = {}
        """Reference of an actor's place, with the deadline, for each that is being started."""
        self.newcomers: set[Member] = set()
        """Workers that run and have no work yet."""
        self._kind: dict[str, Any] = {}
        """Of the first worker's device."""
        self._tries: dict[int, int] = {}
        self._spare_tries = 0
        self._room_looked_at = 0.0
        self.generation = -1
        self.dealt: list[Dealt] = []
        self._notices: list[str] = []

    @property
    def notices(self) -> list[str]:
        """What the user should know of how the run is spread, once it is started."""
        return [*self.servers.notices, *self._relays.notices.values(), *self._notices]

    # -- the start ---------------------------------------------------------------------------------------------------

    def begin(self) -> list[Member]:
        """Ask for the first servers and workers."""
        assert self._state is not None
        state, self._state = self._state, None
        return self.servers.begin(state) + [self._new_worker(number) for number in range(self.target)]

    def _new_worker(self, number: int) -> Member:
        return self.members.add("worker", number, self._starter.worker(number))

    def settle(self) -> None:
        """Number workers node by node: then a node's microbatches are one run, and few tree nodes go over the wire.

        Raises:
            ReplicaMismatch: if devices differ in what changes bits.
        """
        workers = self.members.of("worker")
        for number, member in enumerate(self._by_node(workers)):
            member.number = number
        for member in self.members.of("worker"):
            self._check_kind(member)

    def _by_node(self, workers: Iterable[Member]) -> list[Member]:
        ordered = sorted(workers, key=lambda member: member.number)
        nodes = list(dict.fromkeys(member.node for member in ordered))
        return sorted(ordered, key=lambda member: (nodes.index(member.node), member.number))

    def _check_kind(self, member: Member) -> None:
        assert member.place is not None
        kind = member.place.device_kind or {}
        self._kind = self._kind or kind
        for name, value in kind.items():
            known = self._kind.get(name)
            if value != known:
                raise ReplicaMismatch(
                    f"{member} has {name} {value!r}, the first worker has {known!r}: "
                    "all devices of a run must be of one kind, or their bits differ"
                )

    # -- a generation ------------------------------------------------------------------------------------------------

    def group(self) -> None:
        """Begin a generation: servers forget what was pushed to the open step, microbatches are dealt anew.

        Raises:
            ServerLost: if one dies meanwhile; then another generation is to be begun.
        """
        self.generation += 1
        self.servers.group(self.generation)
        self._assign()

    def dismiss(self) -> None:
        """Begin a generation without workers: what is committed stays.

        Raises:
            ServerLost: if a server dies meanwhile.
        """
        self.generation += 1
        self.servers.group(self.generation)
        self.dealt = []

    def _assign(self) -> None:
        for member in [member for member in self.members.of("worker") if member.number >= self.target]:
            self.members.tell(
                "left", f"{member} leaves after step {self.servers.version}", member, self.servers.version
            )
            self.newcomers.discard(member)
            self.members.remove(member)
        plan = self._config.worker.plan
        # Who is beyond the number of microbatches waits as a spare.
        workers = self._by_node(self.members.of("worker")[: plan.microbatches])
        runs = deal_runs(plan.microbatches, len(workers)) if workers else []
        addresses = self._relays.open(workers, runs)
        rounded = self._round_pushes(runs)
        if self.generation and self.roundings.active:
            text = "what rounding on the wire had left over is dropped: the bits are another run's from here on"
            self.members.tell("dropped", text, step=self.servers.version + 1)
        self.dealt = [
            Dealt(
                member,
                Seat(member.number, position, len(workers), self.generation),
                run,
                addresses[member.node],
                rounding,
            )
            for position, (member, run, rounding) in enumerate(zip(workers, runs, rounded, strict=True))
        ]
        for newcomer in self.newcomers.intersection(workers):
            self._tries.pop(newcomer.number, None)
            text = f"{newcomer} takes its share from step {self.servers.version + 1} on"
            self.members.tell("joined", text, newcomer, self.servers.version + 1)
        self.newcomers.difference_update(workers)

    def _round_pushes(self, runs: list[range]) -> list[Rounding | None]:
        """Workers round what they push through Ray; in shared memory there is no wire."""
        servers = range(self._config.servers.num_servers)
        through_ray = self._config.transport == "ray"
        rounded = [self.roundings.deal(run, servers) if through_ray else None for run in runs]
        if self.generation == 0 and (dropped := self.roundings.dropped):
            named = ", ".join(f"[{node.lo}, {node.hi})" for node in dropped)
            self._notices.append(
                f"residuals of sums over {named} are dropped: in this run nobody sends these sums through Ray"
            )
        return rounded

    # -- losses ------------------------------------------------------------------------------------------------------

    def bury_fallen(self, step: int) -> bool:
        """Forget those whose process has ended; whether a new generation is needed for it."""
        fallen = self.members.fallen()
        for member in fallen:
            self.members.bury(member, "died", step)
        waiting = ("spare", "spare-worker")
        needed = any(member.role not in waiting and member not in self.newcomers for member in fallen)
        self.newcomers.difference_update(fallen)
        return needed

    def bury(self, member: Member, how: str, step: int) -> None:
        """See ``Members.bury``."""
        self.newcomers.discard(member)
        self.members.bury(member, how, step)

    @property
    def wants_change(self) -> bool:
        """Whether a worker has come or is to go, so that microbatches should be dealt anew."""
        spare_runs = len(self.dealt) < min(self.target, self._config.worker.plan.microbatches)
        return (bool(self.newcomers) and spare_runs) or len(self.dealt) > self.target

    # -- those who come ----------------------------------------------------------------------------------------------

    def begin_spares(self) -> None:
        """See that servers and workers have somebody who stands by."""
        for spare in self.servers.new_spares():
            self._start(spare)
        if self._wants_spare_worker():
            self._spare_tries += 1
            self._start(self.members.add("spare-worker", None, self._starter.worker(self.target)))

    def _wants_spare_worker(self) -> bool:
        """On processors alone: a GPU that stands by would be one that does not work."""
        config = self._config
        present = sum(member.role == "spare-worker" for member in self.members)
        if (config.worker.device == "cuda" and not config.share_device) or present >= config.spares:
            return False
        now = time.monotonic()
        if self._missing() or self._spare_tries >= _START_TRIES or now - self._room_looked_at < _ROOM_POLL_S:
            return False
        self._room_looked_at = now
        # Never one that waits for room: it would take that of the next worker that dies.
        return bool(ray.available_resources().get("CPU", 0) >= 1)

    def _missing(self) -> list[int]:
        """Numbers of workers that do not run."""
        present = {member.number for member in self.members.of("worker")}
        return [number for number in range(self.target) if number not in present]

    def fill_from_spares(self) -> list[Member]:
        """Let those who stand by take the places of missing workers; gives them."""
        filled = []
        for number, spare in zip(self._missing(), self.members.of("spare-worker"), strict=False):
            for late in [member for member in self.members if member.role == "worker" and member.number == number]:
                self.members.remove(late)  # it is being started still
            spare.role, spare.number = "worker", number
            self.members.tell("replaced", f"{spare}, which stood by, takes its share", spare)
            filled.append(spare)
        return filled

    def _start(self, member: Member) -> None:
        deadline = time.monotonic() + self._config.start_timeout_s
        self.starting[member.actor.place.remote()] = (member, deadline)

    def take_in(self, reference: Any) -> None:
        """An actor that was being started runs, or does not."""
        member, _ = self.starting.pop(reference)
        if member not in self.members:
            return
        try:
            self.members.put(member, ray.get(reference))
            if member.role != "spare":
                self._check_kind(member)
        except (ray.exceptions.RayError, ReplicaMismatch) as error:
            self.members.remove(member)
            self.members.tell("lost", f"{member} could not be started: {str(error).splitlines()[0]}", member)
            return
        if member.role == "worker":
            if member.number < self.target:
                self.newcomers.add(member)
            else:  # it is not wanted any more
                self.members.remove(member)
            return
        if member.role == "spare":
            self.servers.stand_by(member)
        else:
            self._spare_tries = 0
        self.members.tell("spare", f"{member} stands by", member)

    def ensure_workers(self, least: int = 0) -> None:
        """Wait for replacements if there are too few workers to go on.

        Args:
            least: how many are too few, if it is more than the run's own limit.

        Raises:
            WorkerLost: if too few are left.
        """
        self.fill_from_spares()
        least = max(least, 1, min(self._config.min_workers, self.target))
        while len(live := self.members.of("worker")) < least:
            self.ask_for_workers()
            coming = [reference for reference, (member, _) in self.starting.items() if member.role == "worker"]
            left_s = max((self.starting[reference][1] for reference in coming), default=0.0) - time.monotonic()
            ready, _ = ray.wait(coming, num_returns=1, timeout=max(0.0, left_s)) if coming else ([], [])
            if not ready:
                raise WorkerLost(
                    f"{len(live)} of {self.target} workers are left, --min-workers is {self._config.min_workers}, and "
                    "no other could be started: resume with --resume once the cluster has room"
                )
            for reference in ready:
                self.take_in(reference)

    def ask_for_workers(self) -> None:
        """Start whoever is missing, in the background."""
        self.newcomers.update(self.fill_from_spares())
        present = {member.number for member in self.members if member.role == "worker"}
        for number in [number for number in range(self.target) if number not in present]:
            self._tries[number] = self._tries.get(number, 0) + 1
            if spare := next((member for member in self.members if member.role == "spare-worker"), None):
                spare.role, spare.number = "worker", number  # it is being started still
            elif self._tries[number] <= _START_TRIES:
                self._start(self._new_worker(number))

    # -- reading -----------------------------------------------------------------------------------------------------

    def state(self, version: int, *, release: bool) -> State:
        """A copy of everything at a version, which is given free if it is held and that is asked for.

        Raises:
            ServerLost: if a server dies meanwhile; ask again once it is replaced.
        """
        state = self.servers.state(version)
        residuals = self.roundings.collect(version, self._relays.residuals(version, release=release))
        if release:
            self.servers.release(version)
        return replace(state, residuals=residuals)

    def close(self) -> None:
        """End everything."""
        self.members.close()
        self.servers.close()
