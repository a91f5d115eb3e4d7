"""What a worker and a hub of its machine tell each other; tensors stay where they are, in arenas."""

import marshal
import pickle
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

from paramserver.integers import IntegerBlock
from paramserver.messages import (
    ROW,
    Commit,
    Hello,
    MicrobatchStats,
    Push,
    pack_commit,
    pack_rows,
    unpack_commit,
    unpack_rows,
)
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
    "again_head",
    "decode",
    "encode",
    "encode_again",
    "encode_committed",
    "encode_lasting",
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
    slot: int = -1
    """Where the hub is to keep what is the same in every step, so that ``encode_again`` may follow; -1: nowhere."""


class Heard(NamedTuple):
    """An ``Arrival`` as it comes out: of what is the same in every step a hub has made sense before."""

    lasting: bytes | None
    """See ``read_lasting``; None: what is kept in the slot."""
    slot: int
    step: int
    rows: tuple[MicrobatchStats, ...]
    """Of each microbatch."""
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


# Messages of every step are plain values at fixed places: pickle looks each class up by its name, which in caches that
# a backward has just swept takes longer than all the rest. Everything else is pickled.

_ARRIVAL, _AGAIN, _WRITTEN, _COMMITTED, _PICKLE = b"A", b"S", b"W", b"C", b"P"
_ABOUT = struct.Struct("<cqqi")
"""Kind, slot, step, and bytes of the rows. Those follow, then the integer buffers."""


def encode(message: object) -> bytes:
    """The message as bytes."""
    if isinstance(message, Arrival):
        lasting = encode_lasting(message)
        head = struct.pack("<ci", _ARRIVAL, len(lasting))
        return head + lasting + encode_again(message.push, message.slot)
    if isinstance(message, Committed):
        return encode_committed(pack_commit(message.commit, message.integers))
    if isinstance(message, Written):
        return _WRITTEN
    return _PICKLE + pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)


def encode_lasting(arrival: Arrival) -> bytes:
    """What of an arrival is the same in every step; see ``read_lasting``."""
    push, slices = arrival.push, arrival.slices
    assert isinstance(push.integers, IntegerBlock)
    places: Any = (
        (tuple(slices.place), slices.slices)
        if isinstance(slices, VectorPlace)
        else (None, tuple((index, *place) for index, place in slices.items()))
    )
    return marshal.dumps((push.run, push.generation, push.worker, tuple(push.node), push.integers.layout, places))


def encode_again(push: Push, slot: int) -> bytes:
    """An arrival of which the hub keeps in ``slot`` all that is the same in every step."""
    assert isinstance(push.integers, IntegerBlock)
    rows = pack_rows(push.stats)
    return _ABOUT.pack(_AGAIN, slot, push.step, len(rows)) + rows + push.integers.to_bytes()


def again_head(slot: int, step: int, num_rows: int) -> bytes:
    """With what ``encode_again`` begins, up to the rows."""
    return _ABOUT.pack(_AGAIN, slot, step, ROW.size * num_rows)


def encode_committed(record: bytes) -> bytes:
    """A ``Committed`` of what ``pack_commit`` made, as bytes."""
    return _COMMITTED + record


def decode(data: bytes) -> object:
    """The message that ``encode`` made bytes of, an ``Arrival`` as ``Heard``; from a trusted peer alone."""
    kind = data[:1]
    if kind == _COMMITTED:
        return Committed(*unpack_commit(data[1:]))
    if kind == _AGAIN:
        return _read_again(data, 0, None)
    if kind == _WRITTEN:
        return Written()
    if kind == _ARRIVAL:
        begin = struct.calcsize("<ci")
        end = begin + struct.unpack_from("<ci", data)[1]
        return _read_again(data, end, data[begin:end])
    message: object = pickle.loads(data[1:])
    return message


def _read_again(data: bytes, start: int, lasting: bytes | None) -> Heard:
    _, slot, step, of_rows = _ABOUT.unpack_from(data, start)
    rows = start + _ABOUT.size
    return Heard(lasting, slot, step, unpack_rows(data, rows, rows + of_rows), data[rows + of_rows :])


def read_lasting(data: bytes) -> Lasting:
    """What ``Heard.lasting`` says."""
    run, generation, worker, node, layout, (place, slices) = marshal.loads(data)
    about = (run, generation, worker, Node(*node), layout)
    if place is None:
        return Lasting(*about, {index: Place(*rest) for index, *rest in slices})
    return Lasting(*about, VectorPlace(Place(*place), slices))
