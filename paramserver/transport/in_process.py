"""Servers in the worker's own process: for ``single``, for ``ddp``'s update, and for tests with a thread a worker."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from paramserver.errors import StepTimeout
from paramserver.messages import Commit, Decision, Hello, Push, Report
from paramserver.partition import Slice
from paramserver.server import Server
from paramserver.team import Team
from paramserver.vote import decide

__all__ = ["InProcessServers", "InProcessTransport"]


class InProcessServers:
    """All servers of a run, driven by whoever waits for them; safe for several threads.

    Args:
        servers: the servers.
        threads: how many threads sum and update.
    """

    def __init__(self, servers: Sequence[Server], threads: int = 1) -> None:
        self.servers = list(servers)
        self._team = Team(threads, "servers")
        self._scratches = [[server.new_scratch() for _ in range(threads)] for server in self.servers]
        self._changed = threading.Condition()
        self._reports: dict[int, Report] = {}
        self._failure: BaseException | None = None

    def push(self, server: int, push: Push) -> None:
        """Give a contribution to a server; the step is updated by a ``wait``."""
        with self._changed:
            self.servers[server].push(push)
            self._changed.notify_all()

    def _advance(self) -> None:
        try:
            if not self.servers[0].config.needs_vote:
                for server in self.servers:
                    if server.ready:
                        self._update(server)
            elif all(server.ready for server in self.servers):
                decision = decide([server.report() for server in self.servers], self.servers[0].config)
                for server in self.servers:
                    self._update(server, decision)
        except BaseException as error:
            self._failure = error  # every other waiting thread must hear of it

    def _update(self, server: Server, decision: Decision | None = None) -> None:
        if decision is not None:
            server.decide(decision)
        scratches = self._scratches[self.servers.index(server)]
        rest = server.update_together(server.ready_parts(), self._team, scratches)
        left = iter(rest)  # next() on it is atomic: each part goes to one thread

        def work(thread: int) -> None:
            for index, part in left:
                server.update_part(index, part, scratches[thread])

        if rest:
            self._team.run(work)
        busy = [scratch.take_busy() for scratch in scratches]
        server.commit([{stage: seconds / len(busy) for stage, seconds in thread.items()} for thread in busy])

    def wait(self, server: int, version: int, timeout_s: float) -> Commit:
        """Wait for a commit; see ``Transport.wait``."""

        def arrived() -> bool:
            self._advance()
            return self._failure is not None or self.servers[server].version >= version

        with self._changed:
            done = self._changed.wait_for(arrived, timeout_s)
            self._changed.notify_all()
            if self._failure is not None:
                raise self._failure
            if not done:
                missing = self.servers[server].missing()
                raise StepTimeout(
                    f"step {version}: server {server} waits for microbatches {missing} "
                    f"since {timeout_s:.0f} s (--step-timeout)"
                )
            commit = self.servers[server].last
            assert commit is not None
            return commit

    def close(self) -> None:
        """End the threads."""
        self._team.close()


class InProcessTransport:
    """One worker's way to ``InProcessServers``: nothing is copied."""

    def __init__(self, servers: InProcessServers) -> None:
        self._servers = servers
        self.num_servers = len(servers.servers)

    def hello(self, server: int, timeout_s: float) -> Hello:
        """See ``Transport.hello``."""
        return self._servers.servers[server].hello()

    @property
    def versions(self) -> tuple[Tensor, Tensor] | None:
        """See ``Transport.versions``."""
        first, *others = (server.memory.vectors for server in self._servers.servers)
        shared = all(memory[0].data_ptr() == first[0].data_ptr() for memory in others)
        return first if shared else None

    def allocate(self, numel: int) -> Tensor:
        """See ``Transport.allocate``."""
        return torch.zeros(numel)

    def push(self, server: int, push: Push) -> None:
        """See ``Transport.push``."""
        self._servers.push(server, push)

    def prepare(self, server: int, push: Push) -> Callable[[], None]:
        """See ``Transport.prepare``."""
        return partial(self.push, server, push)

    def wait(self, server: int, version: int, timeout_s: float) -> Commit:
        """See ``Transport.wait``."""
        return self._servers.wait(server, version, timeout_s)

    def await_slices(self, version: int, pieces: Sequence[Slice], timeout_s: float) -> None:
        """See ``Transport.await_slices``: a server here updates all of its slices at once."""
        for server in {piece.server for piece in pieces}:
            self.wait(server, version, timeout_s)

    def arrivals(self, server: int, version: int, timeout_s: float) -> Iterator[Mapping[int, Tensor]]:
        """See ``Carrier.arrivals``."""
        self.wait(server, version, timeout_s)
        held = self._servers.servers[server]
        yield {p.index: v for p, v in zip(held.partition.by_server[server], held.values(version), strict=True)}

    def fetch(self, server: int, version: int, timeout_s: float) -> tuple[Sequence[Tensor], Mapping[str, Tensor]]:
        """See ``Transport.fetch``."""
        held = self._servers.servers[server]
        return held.values(version), held.integers(version)

    def note(self, worker: int, word: int) -> None:
        """See ``Transport.note``."""

    def close(self) -> None:
        """See ``Transport.close``."""
