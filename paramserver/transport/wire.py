"""What a worker and a hub of its machine tell each other; tensors stay where they are, in arenas."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from paramserver.integers import IntegerBlock
from paramserver.messages import Commit, Hello, Push

__all__ = ["Arrival", "AskMissing", "AttachArena", "Committed", "Failed", "Missing", "Place", "VectorPlace", "Welcome"]


class Place(NamedTuple):
    """Where a tensor lies."""

    arena: int
    """Index of the sender's arena."""
    offset: int
    """In bytes."""
    numel: int
    dtype: torch.dtype


class VectorPlace(NamedTuple):
    """Where a flat vector lies, and which slices of it are meant."""

    place: Place
    slices: tuple[int, ...]


@dataclass(frozen=True)
class AttachArena:
    """Worker to hub: the descriptor of arena ``index`` comes with this message."""

    index: int


@dataclass(frozen=True)
class Arrival:
    """Worker to hub: a push, without its tensors."""

    push: Push
    slices: Mapping[int, Place] | VectorPlace


@dataclass(frozen=True)
class AskMissing:
    """Worker to hub: what is waited for? For the message of a time-out."""


@dataclass(frozen=True)
class Welcome:
    """Hub to worker, first: what a transport's ``hello`` tells. The descriptor of the versions' arena comes with it."""

    hello: Hello
    integers: IntegerBlock


@dataclass(frozen=True)
class Committed:
    """Hub to all workers: a new version stands in the arena."""

    commit: Commit
    integers: IntegerBlock


@dataclass(frozen=True)
class Missing:
    """Hub to worker: microbatches that have not arrived."""

    microbatches: list[int]


@dataclass(frozen=True)
class Failed:
    """Hub to worker: an error to raise by the next call; a refused push concerns its sender alone."""

    error: BaseException
