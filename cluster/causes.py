"""What stands behind an error of Ray's: what an actor raised, or its end."""

import re

import ray.exceptions

from cluster.members import Member
from models.errors import TaskError
from paramserver.errors import PushPullError, ServerLost, WorkerLost

__all__ = ["cause_of", "lost"]


def cause_of(error: ray.exceptions.RayError) -> BaseException | None:
    """What an actor raised; None if it is gone."""
    found = error if isinstance(error, ray.exceptions.RayTaskError) else None
    if found is None:
        inner = getattr(error, "cause", None) or getattr(error, "__cause__", None)
        found = inner if isinstance(inner, ray.exceptions.RayTaskError) else None
    if found is None or found.cause is None:
        return None
    cause: BaseException = found.cause
    if not isinstance(cause, PushPullError | TaskError) and found is error:
        # An error in somebody's task: say where, without Ray's colours.
        cause.add_note(re.sub(r"\x1b\[\d+m", "", str(error)))
    return cause


def lost(member: Member) -> PushPullError:
    """What is raised where nobody can take the place of somebody who died."""
    kind = WorkerLost if member.role == "worker" else ServerLost
    details = {member.role: member.number}
    return kind(f"{member} died: look at its log, or resume with --resume", **details)
