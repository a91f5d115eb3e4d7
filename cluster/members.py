"""The processes of a run: which are alive, and which have just died."""

import contextlib
import os
import select
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.events import Event, Kind, Process
from cluster.place import Place, machine

__all__ = ["Member", "Members", "Role"]

Role = Literal["server", "worker", "relay", "spare", "spare-worker", "replica"]

_END_S = 5.0


@dataclass(eq=False)
class Member:
    """One actor of the run."""

    role: Role
    number: int
    """Its name within its role, which it keeps while others come and go."""
    actor: Any
    place: Place | None = None
    """Where it runs, once it does."""
    pidfd: int = -1

    @property
    def node(self) -> str:
        """Ray's id of the node that it runs on."""
        assert self.place is not None
        return self.place.node

    def __str__(self) -> str:
        where = f" (pid {self.place.pid} on {self.place.host})" if self.place else ""
        return f"{self.role} {self.number}{where}"

    def end(self) -> None:
        """Kill it, even if it is stopped, and see it gone: nobody may take its place while it could still write."""
        self.kill()
        if self.place is None:
            return
        if self.pidfd >= 0:
            select.select([self.pidfd], [], [], _END_S)
        else:
            pinned = NodeAffinitySchedulingStrategy(self.place.node, soft=False)
            with contextlib.suppress(Exception):
                killed = ray.remote(_kill).options(num_cpus=0, scheduling_strategy=pinned).remote(self.place.pid)
                ray.get(killed, timeout=_END_S)

    def kill(self) -> None:
        """Kill it, even if it is stopped; it may live on for a moment."""
        # By the system first, where that can be: told by Ray, an actor kills its children before it ends, and among
        # them the one that takes away the named semaphores of loader processes.
        if self.pidfd >= 0:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        with contextlib.suppress(Exception):  # Ray says in many ways that it is dead already
            ray.kill(self.actor)

    def close(self) -> None:
        """Forget its process."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def _kill(pid: int) -> None:
    # Only what Ray started: the number may be another process's by now.
    if b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes():
        process = os.pidfd_open(pid)
        signal.pidfd_send_signal(process, signal.SIGKILL)
        select.select([process], [], [], _END_S)
        os.close(process)


class Members:
    """All actors of a run by role and number; ``close`` ends them.

    Args:
        on_event: called with whatever happens to them.
    """

    def __init__(self, on_event: Callable[[Event], None]) -> None:
        self._on_event = on_event
        self._members: list[Member] = []
        self.lost_at: float | None = None
        """When a worker or server was lost last; set to None once that is made good."""
        self.deaths: Counter[tuple[Role, int]] = Counter()
        """Of workers and servers in the open step, by role and number."""
        self._machine = machine()

    def add(self, role: Role, number: int | None, actor: Any) -> Member:
        """An actor that was asked for; it has no place yet. None gives it the next number of its role."""
        if number is None:
            number = 1 + max((member.number for member in self._members if member.role == role), default=-1)
        member = Member(role, number, actor)
        self._members.append(member)
        return member

    def await_place(self, member: Member, timeout_s: float) -> Member:
        """Wait until an actor runs; one that does not is removed again.

        Raises:
            ray.exceptions.RayError: if it died, raised, or found no place in time.
        """
        try:
            self.put(member, ray.get(member.actor.place.remote(), timeout=max(0.0, timeout_s)))
        except ray.exceptions.RayError:
            self.remove(member)
            raise
        return member

    def put(self, member: Member, place: Place) -> None:
        """The actor runs; on this machine its end is seen at once, elsewhere Ray tells."""
        member.place = place
        if place.machine == self._machine:
            with contextlib.suppress(OSError):  # it is gone already: Ray will tell
                member.pidfd = os.pidfd_open(place.pid)

    def of(self, role: Role) -> list[Member]:
        """Those that run, by number."""
        found = [member for member in self._members if member.role == role and member.place is not None]
        return sorted(found, key=lambda member: member.number)

    def find(self, role: Role, number: int) -> Member | None:
        """The one that runs under this number."""
        return next((member for member in self.of(role) if member.number == number), None)

    def __contains__(self, member: Member) -> bool:
        return member in self._members

    def fallen(self) -> list[Member]:
        """Those whose process has ended; they are still here until ``remove``."""
        watched = [member for member in self._members if member.pidfd >= 0]
        if not watched:
            return []
        poll = select.poll()
        for member in watched:
            poll.register(member.pidfd, select.POLLIN)
        ended = {descriptor for descriptor, _ in poll.poll(0)}
        return [member for member in watched if member.pidfd in ended]

    def tell(self, kind: Kind, text: str, member: Member | None = None, step: int | None = None) -> None:
        """Something has happened, to a member or to all."""
        about: dict[str, Any] = {} if member is None else {"role": member.role, "number": member.number}
        if member is not None and member.place is not None:
            about |= {"pid": member.place.pid, "host": member.place.host}
        self._on_event(Event(kind, text, step=step, **about))

    def bury(self, member: Member, how: str, step: int) -> None:
        """Somebody is dead, or taken for dead: end it and forget it."""
        if member not in self._members:
            return
        if member.role in ("worker", "server"):
            self.lost_at = time.monotonic()
            self.deaths[member.role, member.number] += 1
        self.remove(member)
        self.tell("lost", f"{member} {how} in step {step}", member, step)

    def remove(self, member: Member) -> None:
        """End an actor and forget it."""
        if member in self._members:
            self._members.remove(member)
            member.end()
            member.close()

    def processes(self) -> list[Process]:
        """Rows of processes.json: whatever runs, and this process, the driver."""
        rows = [Process("driver", 0, os.getpid(), "local")]
        for role in get_args(Role):
            rows += [Process(role, m.number, m.place.pid, m.place.node) for m in self.of(role) if m.place]
        return rows

    def __iter__(self) -> Iterator[Member]:
        return iter(list(self._members))

    def close(self) -> None:
        """End all actors."""
        for member in self:
            member.kill()
            member.close()
        self._members.clear()
