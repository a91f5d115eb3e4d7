"""Faults as scenarios: processes die, stop, come late or lose a message at a stage of a step that a file names.

Every process of a run knows the whole scenario and looks at each stage that it sees. A fault happens once in the life
of a run: who claims it makes a file in the run folder first, so a step that is taken again is not disturbed again.
"""

import json
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from paramserver.errors import ConfigError
from workers.timing import PHASES

__all__ = ["NO_FAULTS", "Effect", "Fault", "FaultKind", "Faults", "Observer"]

FaultKind = Literal["kill", "stop", "delay", "drop-response", "raise", "nan", "scale"]
Effect = Literal["drop-response", "nan"]
"""What the place where a fault was seen must do itself."""
FaultRole = Literal["worker", "server", "node", "driver", "relay", "spare", "replica"]

_SERVER_STAGES = ("update", "commit")
"""What workers do not see: they wait."""
_LEFT_S = 30.0


@dataclass(frozen=True)
class Fault:
    """One entry of a scenario."""

    index: int
    """Its place in the file."""
    kind: FaultKind
    role: FaultRole
    number: int
    """Which worker or server; for ``node`` the worker whose node it is."""
    step: int
    """From 1."""
    stage: str
    seconds: float = 1.0
    """Of a delay."""
    workers: int = 0
    """``scale``: how many there are to be."""

    def __post_init__(self) -> None:
        where = f"--faults entry {self.index + 1}"
        if self.kind not in get_args(FaultKind):
            raise ConfigError(f"{where}: {self.kind!r} is no fault: use one of {', '.join(get_args(FaultKind))}")
        if self.role not in get_args(FaultRole):
            raise ConfigError(f"{where}: role {self.role!r}: use one of {', '.join(get_args(FaultRole))}")
        if self.stage not in PHASES:
            raise ConfigError(f"{where}: stage {self.stage!r}: use one of {', '.join(PHASES)}")
        if self.step < 1 or self.number < 0 or self.seconds < 0:
            raise ConfigError(f"{where}: step counts from 1, index from 0, and seconds are not negative")
        if self.kind == "scale" and self.workers < 1:
            raise ConfigError(f"{where}: scale wants workers, 1 or more")
        if self.kind == "nan" and self.role != "worker":
            raise ConfigError(f"{where}: a gradient is a worker's, so nan wants role worker")
        if self.kind == "drop-response" and self.role != "server":
            raise ConfigError(f"{where}: a response is a server's, so drop-response wants role server")


@dataclass(frozen=True)
class Faults:
    """A scenario.

    Args:
        faults: what happens.
        folder: of the run: processes.json there says who is who, and ``faults/`` what has happened.
    """

    faults: tuple[Fault, ...] = ()
    folder: str = ""

    @property
    def scaling(self) -> dict[int, int]:
        """How many workers there are to be after which step."""
        return {fault.step: fault.workers for fault in self.faults if fault.kind == "scale"}

    def observer(self, role: Literal["worker", "server"], number: int) -> "Observer | None":
        """What a process looks at; None if nothing can happen there."""
        seen = [fault for fault in self.faults if fault.kind != "scale" and _sees(fault, role, number)]
        return Observer(seen, role, number, Path(self.folder)) if seen else None


NO_FAULTS = Faults()


def _sees(fault: Fault, role: str, number: int) -> bool:
    """Whether the fault is seen, and so done, by this process."""
    if fault.role == role and (fault.stage == "aggregate" or (role == "server") == (fault.stage in _SERVER_STAGES)):
        return fault.number == number
    if fault.kind in ("drop-response", "raise", "nan", "delay"):  # only the victim itself can do that
        return fault.role == role and fault.number == number
    if fault.role == "worker" and fault.stage not in _SERVER_STAGES:
        return False
    # Somebody else's end: by whoever comes to that stage first.
    return (role == "server") == (fault.stage in _SERVER_STAGES)


class Observer:
    """Looks at the stages of one process.

    Args:
        faults: those that it sees.
        role: what it is.
        number: which one.
        folder: of the run.
    """

    def __init__(self, faults: Sequence[Fault], role: str, number: int, folder: Path) -> None:
        self._faults = list(faults)
        self._role = role
        self._number = number
        self._folder = folder

    def at(self, step: int, stage: str) -> Effect | None:
        """The process enters a stage of step ``step``, from 1."""
        for fault in self._faults:
            if (fault.step, fault.stage) == (step, stage) and self._claim(fault):
                return self._do(fault)
        return None

    def _claim(self, fault: Fault) -> bool:
        try:
            (self._folder / "faults").mkdir(exist_ok=True)
            os.close(os.open(self._folder / "faults" / str(fault.index), os.O_CREAT | os.O_EXCL))
        except OSError:
            return False
        return True

    def _do(self, fault: Fault) -> Effect | None:
        if fault.kind in ("kill", "stop"):
            self._signal(fault, signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
        elif fault.kind == "delay":
            time.sleep(fault.seconds)
        elif fault.kind == "raise":
            raise RuntimeError(f"fault {fault.index + 1} of the scenario, in step {fault.step}, stage {fault.stage}")
        elif fault.kind in ("drop-response", "nan"):
            return "nan" if fault.kind == "nan" else "drop-response"
        return None

    def _signal(self, fault: Fault, number: signal.Signals) -> None:
        if (fault.role, fault.number) == (self._role, self._number):
            os.kill(os.getpid(), number)
            time.sleep(_LEFT_S)  # nothing more may be done by who is being killed
            return
        rows = json.loads((self._folder / "processes.json").read_text(encoding="utf-8"))
        role = "worker" if fault.role == "node" else fault.role
        victim = next((row for row in rows if row["role"] == role and row["index"] == fault.number), None)
        if victim is None:
            return
        victims = [victim["pid"]]
        if fault.role == "node":
            inside = [row["pid"] for row in rows if row["node"] == victim["node"]]
            victims = [_parent(victim["pid"]), *(pid for pid in inside if pid != os.getpid())]
            victims += [os.getpid()] if os.getpid() in inside else []
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        if fault.role == "driver" and number == signal.SIGKILL:
            time.sleep(_LEFT_S)  # Ray ends whatever has no driver; until then it would come to the next step's faults


def _parent(pid: int) -> int:
    """The process that started another one: of an actor, its node's raylet."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    return int(stat.rpartition(")")[2].split()[1])
