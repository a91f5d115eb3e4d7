"""Who keeps a step from its end: processes that live, but hang or are stuck."""

import contextlib
from collections.abc import Mapping, Sequence

import ray
import ray.exceptions

from cluster.members import Member, Members, Role
from workers.timing import stage_of

__all__ = ["FailureDetector"]

_ANSWER_S = 5.0
_WITHOUT_STEPS: tuple[Role, ...] = ("server", "relay", "replica")
"""Roles whose actors answer at once whatever they do; a worker's call takes as long as its run."""


class FailureDetector:
    """Asks around once a step has taken longer than its deadline; nobody is asked before.

    Args:
        members: the run's processes.
        notes: whether workers leave word of where they are, in shared memory.
    """

    def __init__(self, members: Members, *, notes: bool) -> None:
        self._members = members
        self._notes = notes

    def culprits(self, runs: Mapping[Member, range], waited: str) -> list[tuple[Member, str]]:
        """Those who keep all others waiting, and how each is found out.

        Whoever does not answer is meant before whoever the others wait for, since it may be why they wait.

        Args:
            runs: microbatches of each worker of the generation.
            waited: for how long, in words.
        """
        if silent := self._silent():
            return [(member, f"did not answer for {_ANSWER_S:.0f} s") for member in silent]
        return [
            (member, f"kept all others waiting{self._whereabouts(member)} ({waited})") for member in self._late(runs)
        ]

    def _silent(self) -> list[Member]:
        asked = {m.actor.place.remote(): m for role in _WITHOUT_STEPS for m in self._members.of(role)}
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_S)
        answered = []
        for reference in ready:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(reference)
                answered.append(asked[reference])
        return [member for member in asked.values() if member not in answered]

    def _late(self, runs: Mapping[Member, range]) -> Sequence[Member]:
        """Workers whose microbatches have not arrived, or else the relays behind them.

        Before all of them, servers and relays whose thread is too busy to say what they wait for.
        """
        relays = {relay.node: relay for relay in self._members.of("relay")}
        asked = {m: m.actor.missing.remote() for role in ("server", "relay") for m in self._members.of(role)}
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=_ANSWER_S)
        missing: dict[Member, set[int]] = {}
        for member, reference in asked.items():
            with contextlib.suppress(ray.exceptions.RayError):
                missing[member] = set(ray.get(reference, timeout=0))
        if stuck := [member for member in asked if member not in missing]:
            return stuck
        everywhere = set().union(*(missing[server] for server in self._members.of("server")))
        found = []
        for worker, run in runs.items():
            relay = relays.get(worker.node)
            absent = everywhere if relay is None else missing[relay]
            if absent.intersection(run) and worker in self._members:
                found.append(worker)
        return found or (list(relays.values()) if everywhere else [])

    def _whereabouts(self, member: Member) -> str:
        """Where a worker is by its own word, if it could leave one."""
        if not self._notes or member.role != "worker":
            return ""
        near = [m for role in ("server", "relay") for m in self._members.of(role) if m.node == member.node]
        with contextlib.suppress(ray.exceptions.RayError):
            for keeper in near:
                if word := ray.get(keeper.actor.noted.remote(member.number), timeout=_ANSWER_S):
                    return f" in stage {stage_of(word)[1]}"
        return ""
