"""What a worker and a hub tell each other arrives as it was sent, in one piece or in many."""

import os
import socket
from typing import Any

import pytest
import torch

from paramserver.errors import StepTimeout
from paramserver.integers import IntegerBlock
from paramserver.messages import Commit, MicrobatchStats, Push
from paramserver.reduction import Node
from paramserver.transport.channel import Channel, frame
from paramserver.transport.wire import (
    Arrival,
    AttachArena,
    Committed,
    Failed,
    Heard,
    Missing,
    Place,
    VectorPlace,
    decode,
    encode,
    read_lasting,
)

ROWS = (MicrobatchStats(2, 1.25, 3.0, 4), MicrobatchStats(3, float("inf"), 0.0, 0))
INTEGERS = IntegerBlock.pack({"seen": torch.tensor(3), "mask": torch.tensor([True, False])})
PUSH = Push("run", 5, 1, 2, Node(2, 4), {}, ROWS, INTEGERS)
PLACE = Place(1, 4096, 300, "float32")
COMMIT = Commit(6, ROWS, 0.1, True, 2.5, 0.5, {"update": 1.5, "aggregate": 0.5}, 1, True, 3, True)
MESSAGES: dict[str, Any] = {
    "a vector": Arrival(PUSH, VectorPlace(PLACE, (0, 2))),
    "a vector of a kind": Arrival(PUSH, VectorPlace(PLACE, (0, 2)), 3),
    "slices of their own": Arrival(PUSH, {0: PLACE, 3: Place(0, 0, 7, "float64")}),
    "nothing": Arrival(PUSH._replace(stats=(), integers=IntegerBlock.pack({})), {}),
    "a commit": Committed(COMMIT, INTEGERS),
    "a first commit": Committed(Commit(1, (), 0.0), IntegerBlock.pack({})),
    "another": Missing([1, 2]),
}


def _plain(message: Any) -> Any:
    """With blocks as plain values, which ``==`` can compare."""
    if isinstance(message, IntegerBlock):
        return message.layout, message.to_bytes()
    if isinstance(message, tuple):
        return type(message).__name__, tuple(_plain(part) for part in message)
    return message


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES.keys())
def test_a_message_arrives_as_it_was_sent(message: Any) -> None:
    decoded = decode(encode(message))
    assert _plain(_arrival(decoded) if isinstance(decoded, Heard) else decoded) == _plain(message)


def _arrival(heard: Heard) -> Arrival:
    """What was sent, put together from both of its parts."""
    assert heard.lasting is not None
    lasting = read_lasting(heard.lasting)
    integers = IntegerBlock(lasting.layout, heard.integers)
    about = (lasting.run, heard.step, lasting.generation, lasting.worker, lasting.node)
    return Arrival(Push(*about, {}, heard.rows, integers), lasting.slices, heard.slot)


def test_what_lasts_is_the_same_bytes_in_every_step() -> None:
    """By them a hub finds what it has made sense of before."""
    steps = [Arrival(PUSH._replace(step=step, stats=ROWS[step:]), VectorPlace(PLACE, (0, 2))) for step in range(2)]
    first, second = (decode(encode(message)) for message in steps)
    assert isinstance(first, Heard)
    assert isinstance(second, Heard)
    assert first.lasting == second.lasting
    assert (first.step, second.step) == (0, 1)
    assert len(first.rows) == 2


def test_an_error_arrives_with_its_class() -> None:
    failed = decode(encode(Failed(StepTimeout("too late", server=1))))
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, StepTimeout)
    assert failed.error.details == {"server": 1}


def _pair() -> tuple[Channel, socket.socket]:
    one, other = socket.socketpair()
    return Channel(one), other


def test_a_message_in_pieces_outlives_a_deadline() -> None:
    """A peer that stops in the middle of a message costs its reader no more than the reader's own deadline."""
    sender, plain = _pair()
    sender.send(Missing([1]))
    frame = plain.recv(1 << 16)
    receiver, peer = _pair()
    for piece in (frame[:3], frame[3:12]):
        peer.sendall(piece)
        with pytest.raises(TimeoutError):
            receiver.receive(0.0)
    peer.sendall(frame[12:] + frame)
    assert receiver.receive(5.0)[0] == Missing([1])
    assert receiver.receive(0.0)[0] == Missing([1])
    peer.close()
    with pytest.raises(EOFError):
        receiver.receive(5.0)
    for side in (sender, receiver):
        side.close()
    plain.close()


def test_descriptors_come_with_their_message() -> None:
    one, other = (Channel(side) for side in socket.socketpair())
    readers = []
    for index in range(3):
        reader, writer = os.pipe()
        readers.append(reader)
        one.send(Missing([index]))
        one.send(AttachArena(index), [writer])
        os.close(writer)
    for index, reader in enumerate(readers):
        assert other.receive(5.0) == (Missing([index]), [])
        message, (writer,) = other.receive(5.0)
        assert message == AttachArena(index)
        os.write(writer, b"x")
        assert os.read(reader, 1) == b"x"
        os.close(writer)
        os.close(reader)
    one.close()
    other.close()


def test_what_a_peer_does_not_read_is_kept_and_flushed_later() -> None:
    one, other = (Channel(side) for side in socket.socketpair())
    big = encode(Missing(list(range(1 << 20))))
    for _ in range(2):
        one.post(frame(big))
    assert one.pending
    with pytest.raises(TimeoutError):
        other.receive(0.0)
    arrived = 0
    while arrived < 2:
        one.flush()
        found = other.take()
        arrived += found is not None
    assert not one.pending
    one.close()
    other.close()
