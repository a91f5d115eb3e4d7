"""The actors of a run as they stand now: opened, replaced when they are lost, and grouped into a new generation."""

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import ray
import ray.exceptions

from cluster.config import ClusterConfig, Seat
from cluster.events import Event
from cluster.members import Member, Members
from cluster.place import Place
from cluster.placement import check_room
from cluster.rounding import Rounding, Roundings
from cluster.server_actor import ServerStatus
from cluster.starter import Starter
from models.registry import TaskSource
from paramserver.errors import ReplicaMismatch, ServerLost, WorkerLost
from paramserver.messages import Commit
from paramserver.partition import Partition
from paramserver.reduction import maximal_nodes
from paramserver.state import State, assemble
from paramserver.transport.channel import Address
from paramserver.transport.keeper import Keeper
from workers.minibatch import deal_runs
from workers.timing import stage_of

__all__ = ["Crew", "Dealt"]

_ANSWER_S = 15.0
"""For what a live server does at once, unless it is in the middle of an update."""
_SPARE = -1
_START_TRIES = 3
"""How often in a row a replacement may die before it has had work."""


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
        self._partition = partition
        self._restore = restore
        self._on_event = on_event
        self.roundings = Roundings(config, partition, state.residuals)
        self._state: State | None = replace(state, residuals={})  # servers have no use for them
        self._starter = Starter(source, config, partition, replace(state, values={}, optimizer={}, residuals={}))
        self.members = Members()
        self.target = config.worker.num_workers
        """How many workers there should be."""
        self.starting: dict[Any, tuple[Member, float]] = {}
        """Reference of an actor's place, with the deadline, for each that is being started."""
        self.newcomers: set[Member] = set()
        """Workers that run and have no work yet."""
        self._tries: dict[int, int] = {}
        self._addresses: dict[str, dict[int, Address]] = {}
        self._nodes: dict[int, str] = {}
        """Node of each server."""
        self._keeper: Keeper | None = None
        self._keepers: list[tuple[str, Member | None, Address]] = []
        """Node, who keeps (None: this process), and where to ask."""
        self._held = {version for version in config.held_versions if version > state.version}
        self.generation = -1
        self.version = state.version
        """The version from which the generation goes on."""
        self.last: Commit | None = None
        """Its commit."""
        self.commits: list[Commit] = []
        """What servers remember."""
        self.dealt: list[Dealt] = []
        self.notices: list[str] = []
        """What the user should know of how the run is spread, once it is started."""
        self.lost_at: float | None = None
        """When a worker or server was lost last."""

    # -- the start ---------------------------------------------------------------------------------------------------

    def begin(self) -> list[Member]:
        """Ask for the first servers and workers."""
        state = ray.put(self._state)
        self._state = None
        count = self._config.servers.num_servers
        members = [self.members.add("server", number, self._starter.server(state)) for number in range(count)]
        return members + [self._new_worker(number) for number in range(self.target)]

    def _new_worker(self, number: int) -> Member:
        return self.members.add("worker", number, self._starter.worker(number))

    def placed(self, member: Member, place: Place) -> None:
        """An actor runs."""
        self.members.put(member, place)

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
        nodes = list(dict.fromkeys(_node(member) for member in ordered))
        return sorted(ordered, key=lambda member: (nodes.index(_node(member)), member.number))

    def _check_kind(self, member: Member) -> None:
        first = self.members.of("worker")[0]
        assert member.place is not None
        assert first.place is not None
        for name, value in (member.place.device_kind or {}).items():
            known = (first.place.device_kind or {}).get(name)
            if value != known:
                raise ReplicaMismatch(
                    f"worker {member.number} has {name} {value!r}, worker {first.number} has {known!r}: "
                    "all devices of a run must be of one kind, or their bits differ"
                )

    def open_servers(self) -> None:
        """Let servers begin to serve; those of one node share the arena of its first."""
        for member in self.members.of("server"):
            here = self._addresses.setdefault(_node(member), {})
            beside = next(iter(here.values()), None)
            opened = member.actor.open.remote(member.number, beside)
            self._opened(member, ray.get(opened, timeout=self._config.start_timeout_s))

    def _opened(self, member: Member, address: Address) -> None:
        node = _node(member)
        self._addresses.setdefault(node, {})[member.number] = address
        self._nodes[member.number] = node
        if node == ray.get_runtime_context().get_node_id():
            if self._keeper is None:
                self._keeper = Keeper()
                self._keepers.append((node, None, self._keeper.address))
            self._keeper.keep(member.number, address)
        for spare in [spare for spare in self.members.of("spare") if _node(spare) == node]:
            self._keep_by(spare, [member.number])

    # -- a generation ------------------------------------------------------------------------------------------------

    @property
    def server_actors(self) -> list[Any]:
        """Handles of all servers, by number."""
        return [member.actor for member in self.members.of("server")]

    def group(self) -> None:
        """Begin a generation: servers forget what was pushed to the open step, microbatches are dealt anew.

        Raises:
            ServerLost: if one dies meanwhile; then another generation is to be begun.
        """
        self.generation += 1
        for number in range(self._config.servers.num_servers):
            if self.members.find("server", number) is None:
                self._replace_server(number)
        self._place_replicas()
        statuses = self._regroup({})
        self.version = min(status.version for status in statuses)
        self.commits = [commit for status in statuses for commit in (*status.recent, status.last) if commit]
        self.last = next((commit for commit in self.commits if commit.version == self.version), None)
        ahead = [commit for commit in self.commits if commit.version == self.version + 1 and commit.decision]
        if ahead and any(status.version == self.version for status in statuses):
            # Some servers have acted on a vote already: the others must do the same.
            assert ahead[0].decision is not None
            self._regroup({self.version: ahead[0].decision})
        self._assign()

    def _regroup(self, settled: dict[int, Any]) -> list[ServerStatus]:
        members = self.members.of("server")
        actors, held = self.server_actors, sorted(self._held)
        asked = [
            member.actor.regroup.remote(self.generation, actors, held, settled, self._replica_of(member))
            for member in members
        ]
        statuses: list[ServerStatus] = []
        deadline = time.monotonic() + _ANSWER_S
        for member, reference in zip(members, asked, strict=True):
            try:
                statuses.append(ray.get(reference, timeout=max(0.0, deadline - time.monotonic())))
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except (ray.exceptions.GetTimeoutError, ray.exceptions.RayError) as error:
                late = isinstance(error, ray.exceptions.GetTimeoutError)
                self.bury(member, f"did not answer for {_ANSWER_S:.0f} s" if late else "died", self.version + 1)
                raise ServerLost(f"{member} is gone", server=member.number) from None
        return statuses

    def _place_replicas(self) -> None:
        """See that each node with servers has a replica on another node."""
        if not self._config.replicas:
            return
        alive = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        for node in dict.fromkeys(self._nodes.values()):
            if self._replica_for(node) is not None:
                continue
            others = [other for other in alive if other != node]
            if not others:
                if self.generation == 0:
                    self.notices.append("--replicas 1 does nothing here: there is one node alone")
                continue
            number = 1 + max((member.number for member in self.members.of("replica")), default=-1)
            replica = self.members.add("replica", number, self._starter.replica(others[0]))
            try:
                self.members.put(replica, ray.get(replica.actor.place.remote(), timeout=self._config.start_timeout_s))
            except ray.exceptions.RayError:
                self.members.remove(replica)  # the next generation tries again

    def _replica_for(self, node: str) -> Member | None:
        """A replica that outlives the node."""
        return next((replica for replica in self.members.of("replica") if _node(replica) != node), None)

    def _replica_of(self, server: Member) -> Any:
        replica = self._replica_for(_node(server))
        return None if replica is None else replica.actor

    def _assign(self) -> None:
        for member in [member for member in self.members.of("worker") if member.number >= self.target]:
            self._event("left", f"{member} leaves after step {self.version}", member, self.version)
            self.newcomers.discard(member)
            self.members.remove(member)
        plan = self._config.worker.plan
        # Who is beyond the number of microbatches waits as a spare.
        workers = self._by_node(self.members.of("worker")[: plan.microbatches])
        runs = deal_runs(plan.microbatches, len(workers)) if workers else []
        self._open_relays(workers, runs)
        rounded = self._round_pushes(runs)
        if self.generation and self.roundings.active:
            text = "what rounding on the wire had left over is dropped: the bits are another run's from here on"
            self._event("dropped", text, step=self.version + 1)
        self.dealt = [
            Dealt(
                member,
                Seat(member.number, position, len(workers), self.generation),
                run,
                self._addresses[_node(member)] if self._config.transport != "ray" else {},
                rounding,
            )
            for position, (member, run, rounding) in enumerate(zip(workers, runs, rounded, strict=True))
        ]
        for newcomer in self.newcomers.intersection(workers):
            self._tries.pop(newcomer.number, None)
            text = f"{newcomer} takes its share from step {self.version + 1} on"
            self._event("joined", text, newcomer, self.version + 1)
        self.newcomers.difference_update(workers)

    def _open_relays(self, workers: list[Member], runs: list[range]) -> None:
        """On each node with workers, something that stands for the servers elsewhere."""
        if self._config.transport == "ray":
            return
        nodes = list(dict.fromkeys(_node(member) for member in workers))
        for relay in [relay for relay in self.members.of("relay") if _node(relay) not in nodes]:
            self.members.remove(relay)
        for node in nodes:
            known = self._addresses.get(node, {})
            here = {server: address for server, address in known.items() if self._nodes[server] == node}
            self._addresses[node] = here
            far = [server for server in self._nodes if server not in here]
            if not far:
                continue
            inside = [run for member, run in zip(workers, runs, strict=True) if _node(member) == node]
            run = range(inside[0].start, inside[-1].stop)
            self._note_tree_nodes(next(member for member in workers if _node(member) == node), run)
            present = [relay for relay in self.members.of("relay") if _node(relay) == node]
            relay = present[0] if present else self._new_relay(node)
            rounding = self.roundings.deal(run, far)
            beside = next(iter(here.values()), None)
            opened = relay.actor.open.remote(run, self.server_actors, far, beside, rounding, self.version)
            here.update(self._ask(relay, opened))

    def _new_relay(self, node: str) -> Member:
        number = 1 + max((relay.number for relay in self.members.of("relay")), default=-1)
        relay = self.members.add("relay", number, self._starter.relay(node))
        self.members.put(relay, self._ask(relay, relay.actor.place.remote()))
        return relay

    def _ask(self, member: Member, reference: Any) -> Any:
        try:
            return ray.get(reference, timeout=self._config.start_timeout_s)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError:
            self.bury(member, "died", self.version + 1)
            raise ServerLost(f"{member} is gone") from None

    def _note_tree_nodes(self, member: Member, run: range) -> None:
        M = self._config.worker.plan.microbatches
        count = len(maximal_nodes(run.start, run.stop, M))
        if count > 1 and self.generation == 0 and member.place:
            self.notices.append(
                f"{member.place.host} (node {_node(member)[:8]}) sends {count} tree nodes of the parameters' size a "
                f"step, for microbatches [{run.start}, {run.stop}) of {M}: it is 1 where M / nodes is a power of two "
                "and all nodes have as many workers"
            )

    def _round_pushes(self, runs: list[range]) -> list[Rounding | None]:
        """Workers round what they push through Ray; in shared memory there is no wire."""
        servers = range(self._config.servers.num_servers)
        through_ray = self._config.transport == "ray"
        rounded = [self.roundings.deal(run, servers) if through_ray else None for run in runs]
        if self.generation == 0 and (dropped := self.roundings.dropped):
            named = ", ".join(f"[{node.lo}, {node.hi})" for node in dropped)
            self.notices.append(
                f"residuals of sums over {named} are dropped: in this run nobody sends these sums through Ray"
            )
        return rounded

    def request(self, what: str) -> None:
        """Ask server 0, whose commits say when workers stop or come back, for ``request_stop`` or ``request_leave``."""
        if (server := self.members.find("server", 0)) is not None:
            getattr(server.actor, what).remote()

    # -- losses ------------------------------------------------------------------------------------------------------

    def bury_fallen(self, step: int) -> bool:
        """Forget those whose process has ended; whether a new generation is needed for it."""
        fallen = self.members.fallen()
        for member in fallen:
            self.bury(member, "died", step)
        return any(member.role != "spare" and member not in self.newcomers for member in fallen)

    def bury(self, member: Member, how: str, step: int) -> None:
        """Somebody is dead, or taken for dead: end it and forget it."""
        if member not in self.members:
            return
        if member.role in ("worker", "server"):
            self.lost_at = time.monotonic()
        self.members.remove(member)
        self.newcomers.discard(member)
        self._keepers = [kept for kept in self._keepers if kept[1] is not member]
        self.starting = {reference: held for reference, held in self.starting.items() if held[0] is not member}
        self._event("lost", f"{member} {how} in step {step}", member, step)

    def _event(self, kind: Any, text: str, member: Member | None = None, step: int | None = None) -> None:
        place = member.place if member else None
        self._on_event(
            Event(
                kind,
                text,
                role=member.role if member else None,
                number=member.number if member else None,
                pid=place.pid if place else None,
                host=place.host if place else None,
                step=step,
            )
        )

    def silent(self, timeout_s: float) -> list[Member]:
        """Servers and relays that do not answer."""
        asked = {m.actor.place.remote(): m for role in ("server", "relay") for m in self.members.of(role)}
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
        answered = []
        for reference in ready:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(reference)
                answered.append(asked[reference])
        return [member for member in asked.values() if member not in answered]

    def late(self, timeout_s: float) -> list[Member]:
        """Who keeps the open step: workers whose microbatches have not arrived, or else the relays behind them."""
        relays = {_node(relay): relay for relay in self.members.of("relay")}
        asked = {m: m.actor.missing.remote() for role in ("server", "relay") for m in self.members.of(role)}
        missing = {member: set(ray.get(reference, timeout=timeout_s)) for member, reference in asked.items()}
        everywhere = set().union(*(missing[server] for server in self.members.of("server")))
        found = []
        for dealt in self.dealt:
            relay = relays.get(_node(dealt.member))
            absent = everywhere if relay is None else missing[relay]
            if absent.intersection(dealt.run) and dealt.member in self.members:
                found.append(dealt.member)
        return found or (list(relays.values()) if everywhere else [])

    def whereabouts(self, worker: Member, timeout_s: float) -> str:
        """Where a worker is by its own word, if it could leave one."""
        if self._config.transport == "ray":
            return ""
        near = [m for role in ("server", "relay") for m in self.members.of(role) if _node(m) == _node(worker)]
        with contextlib.suppress(ray.exceptions.RayError):
            for member in near:
                if word := ray.get(member.actor.noted.remote(worker.number), timeout=timeout_s):
                    return f" in stage {stage_of(word)[1]}"
        return ""

    # -- servers and their memory ------------------------------------------------------------------------------------

    def _replace_server(self, number: int) -> None:
        """Another process goes on from the memory that a server has left, or all go back to what was saved."""
        node = self._nodes[number]
        self._addresses.get(node, {}).pop(number, None)
        for _, keeper, address in [kept for kept in self._keepers if kept[0] == node]:
            member = self._stand_in(number, node, keeper)
            if member is None:
                continue
            try:
                opened = member.actor.open.remote(number, None, address)
                self._opened(member, ray.get(opened, timeout=self._config.start_timeout_s))
            except (ray.exceptions.RayError, ServerLost):
                self.members.remove(member)
                continue
            self._event("replaced", f"{member} goes on from the committed version", member, self.version + 1)
            return
        if not self._take_replica(number):
            self._restore_all()

    def _take_replica(self, number: int) -> bool:
        """Begin a server again from what another node has kept of it."""
        for replica in self.members.of("replica"):
            try:
                kept = ray.get(replica.actor.newest.remote(number), timeout=_ANSWER_S)
            except ray.exceptions.RayError:
                continue
            member = self.members.add("server", number, self._starter.server())
            try:
                self.members.put(member, ray.get(member.actor.place.remote(), timeout=self._config.start_timeout_s))
                beside = next(iter(self._addresses.get(_node(member), {}).values()), None)
                opened = member.actor.open.remote(number, beside, None, kept)
                self._opened(member, ray.get(opened, timeout=self._config.start_timeout_s))
            except ray.exceptions.RayError:
                self.members.remove(member)  # Ray may not know yet which nodes are gone
                raise ServerLost(f"server {number} could not be started elsewhere", server=number) from None
            text = f"{member} goes on from the replica of version {kept[0].version}"
            self._event("replaced", text, member, kept[0].version + 1)
            return True
        return False

    def _stand_in(self, number: int, node: str, keeper: Member | None) -> Member | None:
        """A process for the place of a server: the spare that has kept its memory, another one, or a new one."""
        spares = [spare for spare in self.members.of("spare") if _node(spare) == node]
        if keeper is not None and keeper not in spares:
            return None
        if spares:
            member = keeper or spares[0]
            member.role, member.number = "server", number
            return member
        member = self.members.add("server", number, self._starter.server(node=node))
        try:
            place = ray.get(member.actor.place.remote(), timeout=self._config.start_timeout_s)
        except ray.exceptions.RayError:
            self.members.remove(member)
            return None
        self.members.put(member, place)
        return member

    def _restore_all(self) -> None:
        """The memory of a server is lost: all begin again from what was saved last."""
        for member in self.members.of("server"):
            self.members.remove(member)
        self._addresses = {}
        state = self._restore()
        reference = ray.put(replace(state, residuals={}))
        deadline = time.monotonic() + self._config.start_timeout_s
        count = self._config.servers.num_servers
        members = [self.members.add("server", number, self._starter.server(reference)) for number in range(count)]
        for member in members:
            try:
                place = ray.get(member.actor.place.remote(), timeout=max(0.0, deadline - time.monotonic()))
            except ray.exceptions.RayError:
                self.members.remove(member)
                raise ServerLost(
                    f"server {member.number} is lost and nowhere started again within "
                    f"{self._config.start_timeout_s:.0f} s: resume with --resume once the cluster has room"
                ) from None
            self.members.put(member, place)
        self.open_servers()
        text = f"the memory of a server is lost: steps are replayed from version {state.version}, the last one saved"
        self._event("restored", text, step=state.version + 1)

    def begin_spares(self) -> None:
        """See that on each node with servers somebody stands by; what is missing is started in the background."""
        for node in dict.fromkeys(self._nodes.values()):
            spares = [m for m in self.members if m.role == "spare" and (m.place is None or _node(m) == node)]
            if len(spares) < self._config.spares and self._tries.get(_SPARE, 0) < _START_TRIES:
                self._tries[_SPARE] = self._tries.get(_SPARE, 0) + 1
                number = 1 + max((spare.number for spare in self.members if spare.role == "spare"), default=-1)
                self._start(self.members.add("spare", number, self._starter.server(node=node)))

    def _keep_by(self, spare: Member, servers: Iterable[int]) -> None:
        """Let a spare keep the memory of servers of its node."""
        for server in servers:
            with contextlib.suppress(ray.exceptions.RayError):  # whichever of the two has died, it will be seen
                kept = spare.actor.keep.remote(server, self._addresses[_node(spare)][server])
                address = ray.get(kept, timeout=_ANSWER_S)
                self._keepers = [known for known in self._keepers if known[1] is not spare]
                self._keepers.insert(0, (_node(spare), spare, address))

    @property
    def wants_change(self) -> bool:
        """Whether a worker has come or is to go, so that microbatches should be dealt anew."""
        spare_runs = len(self.dealt) < min(self.target, self._config.worker.plan.microbatches)
        return (bool(self.newcomers) and spare_runs) or len(self.dealt) > self.target

    # -- those who come ----------------------------------------------------------------------------------------------

    def _start(self, member: Member) -> None:
        deadline = time.monotonic() + self._config.start_timeout_s
        self.starting[member.actor.place.remote()] = (member, deadline)

    def take_in(self, reference: Any) -> None:
        """An actor that was being started runs, or does not."""
        member, _ = self.starting.pop(reference)
        try:
            place = ray.get(reference)
        except ray.exceptions.RayError as error:
            self.members.remove(member)
            self._event("lost", f"{member} could not be started: {str(error).splitlines()[0]}", member)
            return
        self.members.put(member, place)
        if member.role == "spare":
            self._tries.pop(_SPARE, None)
            self._keep_by(member, [server for server, node in self._nodes.items() if node == place.node])
            return
        if member.number >= self.target:  # it is not wanted any more
            self.members.remove(member)
            return
        self._check_kind(member)
        self.newcomers.add(member)

    def ensure_workers(self, least: int = 0) -> None:
        """Wait for replacements if there are too few workers to go on.

        Args:
            least: how many are too few, if it is more than the run's own limit.

        Raises:
            WorkerLost: if too few are left.
        """
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
        present = {member.number for member in self.members if member.role == "worker"}
        for number in [number for number in range(self.target) if number not in present]:
            self._tries[number] = self._tries.get(number, 0) + 1
            if self._tries[number] <= _START_TRIES:
                self._start(self._new_worker(number))

    # -- reading -----------------------------------------------------------------------------------------------------

    def state(self, version: int, *, release: bool) -> State:
        """A copy of everything at a version.

        Raises:
            ServerLost: if a server dies meanwhile; ask again once it is replaced.
        """
        servers = self.members.of("server")
        asked = [member.actor.snapshot.remote(version) for member in servers]
        relays = self.members.of("relay") if self.roundings.active else []
        rounded = [relay.actor.residuals.remote(version, release=release) for relay in relays]
        timeout_s = self._config.worker.step_timeout_s
        try:
            state = assemble(self._partition, ray.get(asked, timeout=timeout_s))
            residuals = self.roundings.collect(version, ray.get(rounded, timeout=timeout_s))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:
            raise ServerLost(f"a server died while version {version} was read") from error
        if release:
            self._held.discard(version)
            for member in servers:
                member.actor.release.remote(version)
        return replace(state, residuals=residuals)

    def close(self) -> None:
        """End everything."""
        self.members.close()
        if self._keeper is not None:
            self._keeper.close()


def _node(member: Member) -> str:
    assert member.place is not None
    return member.place.node
