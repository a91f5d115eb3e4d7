"""Stands on a node for a server elsewhere: one push and one pull a node, however many workers it has."""

import queue
import threading
from collections.abc import Mapping, Sequence

from torch import Tensor

from paramserver.integers import IntegerBlock
from paramserver.messages import Push
from paramserver.node_sum import NodeSum
from paramserver.partition import Partition
from paramserver.transport.channel import Address
from paramserver.transport.hub import Hub
from paramserver.transport.protocol import Carrier
from paramserver.transport.versions import VersionsArena

__all__ = ["Relay"]

_MESSAGE_ELEMENTS = 1 << 20
"""4 MiB: slices that wait are sent together up to this size, since a message costs up to a millisecond."""


class Relay:
    """A ``Hub`` whose pushes go on, summed, and whose versions come from the server; use ``close`` at the end.

    Args:
        server: which server.
        partition: of the run.
        num_microbatches: ``M``.
        run: the node's microbatches.
        transport: the way to the server.
        versions: the node's arena.
        threads: how many threads sum.
        timeout_s: deadline of each wait for the server.
        least_version: where the run's servers stand that are furthest behind; None: all are at one version.
    """

    def __init__(
        self,
        server: int,
        partition: Partition,
        num_microbatches: int,
        run: range,
        transport: Carrier,
        versions: VersionsArena,
        *,
        threads: int,
        timeout_s: float,
        least_version: int | None = None,
    ) -> None:
        self._server = server
        self._transport = transport
        self._timeout_s = timeout_s
        hello = transport.hello(server, timeout_s)
        integers: dict[int, IntegerBlock] = {}
        for version in range(hello.version if least_version is None else least_version, hello.version + 1):
            values, held = transport.fetch(server, version, timeout_s)
            integers[version] = IntegerBlock.pack(held)
            for piece, value in zip(partition.by_server[server], values, strict=True):
                versions.vectors[version % 2][piece.start : piece.stop].copy_(value)
        self._outbox: queue.SimpleQueue[Push | None] = queue.SimpleQueue()
        self._begun: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._sum = NodeSum(
            server,
            partition,
            num_microbatches,
            run,
            hello,
            integers,
            versions.vectors,
            self._outbox.put,
        )
        self._hub = Hub(self._sum, versions, threads=threads)
        for carry in (self._carry_up, self._carry_down):
            threading.Thread(target=carry, name=f"relay-{server}", daemon=True).start()

    @property
    def address(self) -> Address:
        """Where the node's workers connect."""
        return self._hub.address

    # Two threads, so that slices which the server has updated come down while others still go up.

    def _carry_up(self) -> None:
        """Step after step: what is summed goes to the server."""
        try:
            while self._send_step():
                pass
        except BaseException as error:  # nobody else would hear of it
            self._hub.fail(error)
        finally:
            self._begun.put(False)

    def _carry_down(self) -> None:
        """Step after step: what the server updates comes back."""
        try:
            while self._begun.get():
                version = self._sum.version + 1
                for slices in self._transport.arrivals(self._server, version, self._timeout_s):
                    self._hub.written(self._sum.write(version, slices), version)
                commit = self._transport.wait(self._server, version, self._timeout_s)
                _, integers = self._transport.fetch(self._server, version, self._timeout_s)
                self._hub.call(lambda: self._sum.arrive(commit, integers)).result()  # noqa: B023
        except BaseException as error:
            self._hub.fail(error)

    def _send_step(self) -> bool:
        """Send a whole step, in the order in which slices become whole; False once this is closed."""
        left = self._sum.pushes
        while left:
            waiting: list[Push] = []
            while not waiting or (len(waiting) < left and not self._outbox.empty()):
                push = self._outbox.get()
                if push is None:
                    return False
                waiting.append(push)
            if left == self._sum.pushes:
                self._begun.put(True)  # now the servers' deadline counts
            left -= len(waiting)
            for push in _joined(waiting):
                self._transport.push(self._server, push)
        return True

    def missing(self) -> list[int]:
        """The node's microbatches that have not arrived here."""
        return self._hub.call(self._sum.missing).result()

    def close(self) -> None:
        """Stop serving."""
        self._outbox.put(None)
        self._hub.close()


def _joined(pushes: Sequence[Push]) -> list[Push]:
    """The same contributions in fewer messages: slices of one tree node go together, up to a size."""
    joined: list[Push] = []
    for node in dict.fromkeys(push.node for push in pushes):
        slices: dict[int, Tensor] = {}
        for push in (push for push in pushes if push.node == node):
            if slices and _elements(slices) + _elements(push.slices) > _MESSAGE_ELEMENTS:
                joined.append(push._replace(slices=slices))
                slices = {}
            slices = {**slices, **push.slices}
        joined.append(push._replace(slices=slices))
    return joined


def _elements(slices: Mapping[int, Tensor]) -> int:
    return sum(values.numel() for values in slices.values())
