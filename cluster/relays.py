"""What stands on a node with workers for the servers of other nodes: opened for each generation, and read."""

from collections.abc import Sequence
from typing import Any

import ray
import ray.exceptions

from cluster.config import ClusterConfig
from cluster.members import Member, Members
from cluster.rounding import Roundings
from cluster.servers import Servers
from cluster.starter import Starter
from paramserver.errors import ServerLost
from paramserver.reduction import maximal_nodes
from paramserver.residuals import SliceResiduals
from paramserver.transport.channel import Address

__all__ = ["Relays"]


class Relays:
    """See the module.

    Args:
        config: settings of all actors.
        starter: asks for actors.
        members: the run's processes.
        servers: for which they stand.
        roundings: of what they send.
    """

    def __init__(
        self, config: ClusterConfig, starter: Starter, members: Members, servers: Servers, roundings: Roundings
    ) -> None:
        self._config = config
        self._starter = starter
        self._members = members
        self._servers = servers
        self._roundings = roundings
        self.notices: dict[str, str] = {}
        """By node: what the user should know of it."""

    def open(self, workers: Sequence[Member], runs: Sequence[range]) -> dict[str, dict[int, Address]]:
        """See that every server is reached from each node with workers.

        Args:
            workers: of the generation, node by node.
            runs: their microbatches.

        Returns:
            By node: where each server is reached by shared memory; nothing if Ray carries everything.

        Raises:
            ServerLost: if a relay dies meanwhile, or none can be started.
        """
        nodes = list(dict.fromkeys(member.node for member in workers))
        if self._config.transport == "ray":
            return {node: {} for node in nodes}
        for relay in [relay for relay in self._members.of("relay") if relay.node not in nodes]:
            self._members.remove(relay)
        addresses: dict[str, dict[int, Address]] = {}
        for node in nodes:
            addresses[node] = here = dict(self._servers.addresses.get(node, {}))
            far = [server for server in self._servers.nodes if server not in here]
            if far:
                inside = [run for member, run in zip(workers, runs, strict=True) if member.node == node]
                here.update(self._open_on(node, range(inside[0].start, inside[-1].stop), far))
        return addresses

    def _open_on(self, node: str, run: range, far: list[int]) -> dict[int, Address]:
        present = [relay for relay in self._members.of("relay") if relay.node == node]
        relay = present[0] if present else self._start(node)
        self._note_tree_nodes(relay, run)
        beside = next(iter(self._servers.addresses.get(node, {}).values()), None)
        rounding = self._roundings.deal(run, far)
        opened = relay.actor.open.remote(run, self._servers.actors, far, beside, rounding, self._servers.version)
        addresses: dict[int, Address] = self._answer(relay, opened)
        return addresses

    def _start(self, node: str) -> Member:
        relay = self._members.add("relay", None, self._starter.relay(node))
        try:
            return self._members.await_place(relay, self._config.start_timeout_s)
        except ray.exceptions.RayError:
            raise ServerLost(f"nothing that stands for servers elsewhere could be started on node {node[:8]}") from None

    def _answer(self, relay: Member, reference: Any) -> Any:
        try:
            return ray.get(reference, timeout=self._config.start_timeout_s)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError:
            self._members.bury(relay, "died", self._servers.version + 1)
            raise ServerLost(f"{relay} is gone") from None

    def _note_tree_nodes(self, relay: Member, run: range) -> None:
        assert relay.place is not None
        M = self._config.worker.plan.microbatches
        count = len(maximal_nodes(run.start, run.stop, M))
        self.notices.pop(relay.node, None)
        if count > 1:
            self.notices[relay.node] = (
                f"{relay.place.host} (node {relay.node[:8]}) sends {count} tree nodes of the parameters' size a "
                f"step, for microbatches [{run.start}, {run.stop}) of {M}: it is 1 where M / nodes is a power of two "
                "and all nodes have as many workers"
            )

    def residuals(self, version: int, *, release: bool) -> list[SliceResiduals]:
        """What rounding has left over of what they sent for a version.

        Raises:
            ServerLost: if one dies meanwhile.
        """
        relays = self._members.of("relay") if self._roundings.active else []
        asked = [relay.actor.residuals.remote(version, release=release) for relay in relays]
        try:
            found: list[SliceResiduals] = ray.get(asked, timeout=self._config.worker.step_timeout_s)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:
            raise ServerLost(f"a relay died while version {version} was read") from error
        return found
