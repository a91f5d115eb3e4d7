"""The servers of a run: opened, replaced when they are lost, by whoever has kept their memory, and read."""

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import ray
import ray.exceptions

from cluster.config import ClusterConfig
from cluster.members import Member, Members
from cluster.server_actor import ServerStatus
from cluster.starter import Starter
from paramserver.errors import ServerLost
from paramserver.messages import Commit, Decision
from paramserver.partition import Partition
from paramserver.state import State, assemble
from paramserver.transport.channel import Address
from paramserver.transport.keeper import Keeper

__all__ = ["Servers"]

_ANSWER_S = 15.0
"""For what a live server does at once, unless it is in the middle of an update."""
_START_TRIES = 3
"""How often in a row a spare may die before it stands by."""


class Servers:
    """See the module.

    Args:
        config: settings of all actors.
        partition: of the task's model.
        starter: asks for actors.
        members: the run's processes.
        version: what the run starts from.
        restore: the newest state that was saved.
    """

    def __init__(
        self,
        config: ClusterConfig,
        partition: Partition,
        starter: Starter,
        members: Members,
        version: int,
        restore: Callable[[], State],
    ) -> None:
        self._config = config
        self._partition = partition
        self._starter = starter
        self._members = members
        self._restore = restore
        self.nodes: dict[int, str] = {}
        """Node of each server."""
        self.addresses: dict[str, dict[int, Address]] = {}
        """By node: where its servers are reached by shared memory."""
        self._keeper: Keeper | None = None
        self._keepers: list[tuple[str, Member | None, Address]] = []
        """Node, who keeps (None: this process), and where to ask."""
        self._spare_tries = 0
        self._held = {held for held in config.held_versions if held > version}
        self.version = version
        """The version that all of them have."""
        self.last: Commit | None = None
        """Its commit."""
        self.commits: list[Commit] = []
        """What they remember."""
        self.notices: list[str] = []
        """What the user should know of them, once they are started."""

    # -- the start ---------------------------------------------------------------------------------------------------

    def begin(self, state: State) -> list[Member]:
        """Ask for all of them, to start from ``state``; ``open`` follows once they have their places."""
        reference = ray.put(replace(state, residuals={}))  # they have no use for those
        count = self._config.servers.num_servers
        return [self._members.add("server", number, self._starter.server(reference)) for number in range(count)]

    def open(self) -> None:
        """Let servers begin to serve; those of one node share the arena of its first."""
        for member in self._members.of("server"):
            here = self.addresses.setdefault(member.node, {})
            beside = next(iter(here.values()), None)
            opened = member.actor.open.remote(member.number, beside)
            self._opened(member, ray.get(opened, timeout=self._config.start_timeout_s))

    def _opened(self, member: Member, address: Address) -> None:
        node = member.node
        self.addresses.setdefault(node, {})[member.number] = address
        self.nodes[member.number] = node
        if node == ray.get_runtime_context().get_node_id():
            if self._keeper is None:
                self._keeper = Keeper()
                self._keepers.append((node, None, self._keeper.address))
            self._keeper.keep(member.number, address)
        for spare in [spare for spare in self._members.of("spare") if spare.node == node]:
            self._keep_by(spare, [member.number])

    @property
    def actors(self) -> list[Any]:
        """Handles of all servers, by number."""
        return [member.actor for member in self._members.of("server")]

    # -- a generation ------------------------------------------------------------------------------------------------

    def group(self, generation: int) -> None:
        """Begin a generation: what was pushed to the open step is forgotten, and all say what they have committed.

        Raises:
            ServerLost: if one dies meanwhile; then another generation is to be begun.
        """
        for number in range(self._config.servers.num_servers):
            if self._members.find("server", number) is None:
                self._replace(number)
        self._place_replicas(generation)
        statuses = self._regroup(generation, {})
        versions = [status.version for status in statuses]
        if max(versions) - min(versions) > 1:
            # A replica had lost its server before the server was lost: the others have gone on.
            self._restore_all()
            statuses = self._regroup(generation, {})
        self.version = min(status.version for status in statuses)
        self.commits = [commit for status in statuses for commit in (*status.recent, status.last) if commit]
        self.last = next((commit for commit in self.commits if commit.version == self.version), None)
        ahead = [commit.decision for commit in self.commits if commit.version == self.version + 1]
        if ahead and ahead[0] is not None and any(status.version == self.version for status in statuses):
            # Some servers have acted on a vote already: the others must do the same.
            self._regroup(generation, {self.version: ahead[0]})

    def _regroup(self, generation: int, settled: Mapping[int, Decision]) -> list[ServerStatus]:
        members = self._members.of("server")
        actors, held = self.actors, sorted(self._held)
        asked = [
            member.actor.regroup.remote(generation, actors, held, settled, self._replica_of(member))
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
                self._members.bury(
                    member, f"did not answer for {_ANSWER_S:.0f} s" if late else "died", self.version + 1
                )
                raise ServerLost(f"{member} is gone", server=member.number) from None
        return statuses

    def _place_replicas(self, generation: int) -> None:
        """See that each node with servers has a replica on another node."""
        if not self._config.replicas:
            return
        alive = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        for node in dict.fromkeys(self.nodes.values()):
            if self._replica_for(node) is not None:
                continue
            others = [other for other in alive if other != node]
            if others:
                replica = self._members.add("replica", None, self._starter.replica(others[0]))
                with contextlib.suppress(ray.exceptions.RayError):  # the next generation tries again
                    self._members.await_place(replica, self._config.start_timeout_s)
                    if generation:
                        self._members.tell("replaced", f"{replica} keeps what servers commit from now on", replica)
            elif "--replicas" not in "".join(self.notices):
                self.notices.append("--replicas 1 does nothing here: there is one node alone")

    def _replica_for(self, node: str) -> Member | None:
        """A replica that outlives the node."""
        return next((replica for replica in self._members.of("replica") if replica.node != node), None)

    def _replica_of(self, server: Member) -> Any:
        replica = self._replica_for(server.node)
        return None if replica is None else replica.actor

    # -- losses ------------------------------------------------------------------------------------------------------

    def _replace(self, number: int) -> None:
        """Another process goes on from the memory that a server has left, or from a replica of it.

        If there is neither, all go back to what was saved.
        """
        node = self.nodes[number]
        self.addresses.get(node, {}).pop(number, None)
        for _, keeper, address in [kept for kept in self._keepers if kept[0] == node]:
            with contextlib.suppress(ray.exceptions.RayError, ServerLost):
                member = self._stand_in(number, node, keeper)
                if member is not None and self._open_in_place(member, None, address):
                    text = f"{member} goes on from the committed version"
                    self._members.tell("replaced", text, member, self.version + 1)
                    return
        if not self._take_replica(number):
            self._restore_all()

    def _open_in_place(
        self, member: Member, beside: Address | None, keeper: Address | None, replica: Any = None
    ) -> bool:
        """Let a process take a server's place; one that cannot is removed."""
        try:
            opened = member.actor.open.remote(member.number, beside, keeper, replica)
            self._opened(member, ray.get(opened, timeout=self._config.start_timeout_s))
        except (ray.exceptions.RayError, ServerLost):
            self._members.remove(member)
            return False
        return True

    def _stand_in(self, number: int, node: str, keeper: Member | None) -> Member | None:
        """A process for the place of a server: the spare that has kept its memory, another one, or a new one.

        None if the keeper does not stand by any more.
        """
        spares = [spare for spare in self._members.of("spare") if spare.node == node]
        if keeper is not None and keeper not in spares:
            return None
        if spares:
            member = keeper or spares[0]
            member.role, member.number = "server", number
            return member
        member = self._members.add("server", number, self._starter.server(node=node))
        return self._members.await_place(member, self._config.start_timeout_s)

    def _take_replica(self, number: int) -> bool:
        """Begin a server again from what another node has kept of it; whether there is such a thing."""
        for replica in self._members.of("replica"):
            try:
                kept = ray.get(replica.actor.newest.remote(number), timeout=_ANSWER_S)
            except ray.exceptions.RayError:
                continue
            self._make_room()
            member = self._members.add("server", number, self._starter.server())
            with contextlib.suppress(ray.exceptions.RayError):
                self._members.await_place(member, self._config.start_timeout_s)
                beside = next(iter(self.addresses.get(member.node, {}).values()), None)
                if self._open_in_place(member, beside, None, kept):
                    text = f"{member} goes on from the replica of version {kept[0].version}"
                    self._members.tell("replaced", text, member, kept[0].version + 1)
                    return True
            # Ray may not know yet which nodes are gone.
            raise ServerLost(f"server {number} could not be started elsewhere", server=number)
        return False

    def _restore_all(self) -> None:
        """The memory of a server is lost: all begin again from what was saved last."""
        for member in self._members.of("server"):
            self._members.remove(member)
        self._make_room()
        self.addresses = {}
        state = self._restore()
        deadline = time.monotonic() + self._config.start_timeout_s
        for member in self.begin(state):
            try:
                self._members.await_place(member, deadline - time.monotonic())
            except ray.exceptions.RayError:
                raise ServerLost(
                    f"server {member.number} is lost and nowhere started again within "
                    f"{self._config.start_timeout_s:.0f} s: resume with --resume once the cluster has room"
                ) from None
        self.open()
        text = f"the memory of a server is lost: steps are replayed from version {state.version}, the last one saved"
        self._members.tell("restored", text, step=state.version + 1)

    def _make_room(self) -> None:
        """A worker in reserve may stand where the only place for a server is."""
        for spare in [member for member in self._members if member.role == "spare-worker"]:
            self._members.remove(spare)

    def new_spares(self) -> list[Member]:
        """Those that were just asked for, so that on each node with servers somebody stands by; see ``stand_by``."""
        wanted = []
        for node in dict.fromkeys(self.nodes.values()):
            spares = [m for m in self._members if m.role == "spare" and (m.place is None or m.node == node)]
            if len(spares) < self._config.spares and self._spare_tries < _START_TRIES:
                self._spare_tries += 1
                wanted.append(self._members.add("spare", None, self._starter.server(node=node)))
        return wanted

    def stand_by(self, spare: Member) -> None:
        """A spare runs: let it keep the memory of the servers of its node."""
        self._spare_tries = 0
        self._keep_by(spare, [server for server, node in self.nodes.items() if node == spare.node])

    def _keep_by(self, spare: Member, servers: Iterable[int]) -> None:
        for server in servers:
            with contextlib.suppress(ray.exceptions.RayError):  # whichever of the two has died, it will be seen
                kept = spare.actor.keep.remote(server, self.addresses[spare.node][server])
                address = ray.get(kept, timeout=_ANSWER_S)
                self._keepers = [known for known in self._keepers if known[1] is not spare]
                self._keepers.insert(0, (spare.node, spare, address))

    # -- reading and asking ------------------------------------------------------------------------------------------

    def request(self, what: str) -> None:
        """Ask server 0, whose commits say when workers stop or come back, for ``request_stop`` or ``request_leave``."""
        if (server := self._members.find("server", 0)) is not None:
            getattr(server.actor, what).remote()

    def state(self, version: int) -> State:
        """A copy of everything at a version.

        Raises:
            ServerLost: if one dies meanwhile; ask again once it is replaced.
        """
        asked = [actor.snapshot.remote(version) for actor in self.actors]
        try:
            return assemble(self._partition, ray.get(asked, timeout=self._config.worker.step_timeout_s))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:
            raise ServerLost(f"a server died while version {version} was read") from error

    def release(self, version: int) -> None:
        """A held version was read by whoever had it held."""
        self._held.discard(version)
        for actor in self.actors:
            actor.release.remote(version)

    def close(self) -> None:
        """Keep nothing any more."""
        if self._keeper is not None:
            self._keeper.close()
