"""What a worker and a hub of its machine tell each other; tensors stay where they are, in arenas."""

import marshal
import pickle
from collections.abc import Mapping
from typing import Any, NamedTuple

from paramserver.integers import IntegerBlock
from paramserver.messages import Commit, Hello, Push, pack_commit, unpack_commit
from paramserver.reduction import Node

__all__ = [
    "Arenas",
    "Arrival",
    "AskArenas",
    "AskCommit",
    "AskMissing",
    "AttachArena",
    "Committed",
    "Failed",
    "Heard",
    "Lasting",
    "Missing",
    "Place",
    "VectorPlace",
    "Watch",
    "Welcome",
    "Written",
    "decode",
    "encode",
    "encode_committed",
    "read_lasting",
]


class Place(NamedTuple):
    """Where a tensor lies."""

    arena: int
    """Index of the sender's arena."""
    offset: int
    """In bytes."""
    numel: int
    dtype: str
    """Its name in torch: to pickle a dtype itself, Python looks through all modules there are."""


class VectorPlace(NamedTuple):
    """Where a flat vector lies, and which slices of it are meant."""

    place: Place
    slices: tuple[int, ...]


class AttachArena(NamedTuple):
    """Worker to hub: the descriptor of an arena comes with this message."""

    arena: int
    """Its index, by which the worker will name it."""


class Arrival(NamedTuple):
    """Worker to hub: a push without its slices; its integer buffers are a block."""

    push: Push
    slices: Mapping[int, Place] | VectorPlace


class Heard(NamedTuple):
    """An ``Arrival`` as it comes out: of what is the same in every step a hub has made sense before."""

    lasting: bytes
    """See ``read_lasting``."""
    step: int
    rows: tuple[tuple[int, float, float, int], ...]
    """Of each microbatch; see ``MicrobatchStats``."""
    integers: bytes
    """Content of the block of integer buffers."""


class Lasting(NamedTuple):
    """What is the same in every step in which a worker pushes the same slices for the same node."""

    run: str
    generation: int
    worker: int
    node: Node
    layout: bytes
    """Of the block of integer buffers."""
    slices: Mapping[int, Place] | VectorPlace


class AskMissing(NamedTuple):
    """Worker to hub: what is waited for? For the message of a time-out."""


class AskCommit(NamedTuple):
    """Worker to hub: say ``Committed`` again; the arena shows a version of which no word came."""


class Welcome(NamedTuple):
    """Hub to worker, first: what a transport's ``hello`` tells. The descriptor of the versions' arena comes with it."""

    hello: Hello
    integers: Mapping[int, IntegerBlock]
    """Of the committed version, and of the one before it where that still stands."""


class Committed(NamedTuple):
    """Hub to all workers: a new version stands in the arena."""

    commit: Commit
    integers: IntegerBlock


class AskArenas(NamedTuple):
    """Keeper to hub, or a server's replacement to a keeper: show the arenas in which a server's versions lie."""

    server: int


class Arenas(NamedTuple):
    """The answer: descriptors of the versions' arena and of the server's own come with it."""


class Watch(NamedTuple):
    """Worker to hub: say ``Written`` from now on."""


class Written(NamedTuple):
    """Hub to watching workers, and at once to one that begins to: look at the slices in the arena again."""


class Missing(NamedTuple):
    """Hub to worker: microbatches that have not arrived."""

    microbatches: list[int]


class Failed(NamedTuple):
    """Hub to worker: an error to raise by the next call; a refused push concerns its sender alone."""

    error: BaseException


# Messages of every step are marshalled as tuples of plain values: pickle looks each class up by its name, which in
# caches that a backward has just swept takes longer than all the rest. Everything else is pickled.

_ARRIVAL, _COMMITTED, _PICKLE = b"A", b"C", b"P"


def encode(message: object) -> bytes:
    """The message as bytes."""
    if isinstance(message, Arrival):
        push, slices = message.push, message.slices
        assert isinstance(push.integers, IntegerBlock)
        places: Any = (
            (tuple(slices.place), slices.slices)
            if isinstance(slices, VectorPlace)
            else (None, tuple((index, *place) for index, place in slices.items()))
        )
        lasting = (push.run, push.generation, push.worker, tuple(push.node), push.integers.layout, places)
        rows = tuple(tuple(row) for row in push.stats)
        return _ARRIVAL + marshal.dumps((marshal.dumps(lasting), push.step, rows, push.integers.to_bytes()))
    if isinstance(message, Committed):
        return encode_committed(pack_commit(message.commit, message.integers))
    return _PICKLE + pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)


def encode_committed(record: bytes) -> bytes:
    """A ``Committed`` of what ``pack_commit`` made, as bytes."""
    return _COMMITTED + record


def decode(data: bytes) -> object:
    """The message that ``encode`` made bytes of, an ``Arrival`` as ``Heard``; from a trusted peer alone."""
    if data[:1] == _ARRIVAL:
        return Heard(*marshal.loads(data[1:]))
    if data[:1] == _COMMITTED:
        return Committed(*unpack_commit(data[1:]))
    message: object = pickle.loads(data[1:])
    return message


def read_lasting(data: bytes) -> Lasting:
    """What ``Heard.lasting`` says."""
    run, generation, worker, node, layout, (place, slices) = marshal.loads(data)
    about = (run, generation, worker, Node(*node), layout)
    if place is None:
        return Lasting(*about, {index: Place(*rest) for index, *rest in slices})
    return Lasting(*about, VectorPlace(Place(*place), slices))
