"""Small messages and file descriptors between two processes of one machine, over a Unix socket.

Addresses are in Linux's abstract namespace: there is no file that could be left behind, and no length limit of a
temporary folder to mind. Both sides must be the same user's, and the caller shows a token before anything it sends is
unpickled.
"""

import array
import contextlib
import hmac
import os
import secrets
import select
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any

from paramserver.transport.wire import decode, encode

__all__ = ["HEADER_BYTES", "Address", "Channel", "connect", "frame", "heading", "listen"]

_HEADER = struct.Struct("<QB")
"""Length of the pickle, and how many descriptors come with it."""
HEADER_BYTES = _HEADER.size
_PIECE = 1 << 16
_SEND_S = 30.0
_ANCILLARY_BYTES = socket.CMSG_LEN(4 * array.array("i").itemsize)
"""Room for four descriptors."""
_TOKEN_BYTES = 32
_GREETING_S = 10.0

Address = tuple[str, bytes]
"""Name of the socket, and the token that it wants to see."""


def frame(payload: bytes, descriptors: int = 0) -> bytes:
    """What goes over the socket for a message that ``encode`` made: made once, it can be sent to many."""
    return heading(len(payload), descriptors) + payload


def heading(length: int, descriptors: int = 0) -> bytes:
    """With what the frame of a message of ``length`` bytes begins."""
    return _HEADER.pack(length, descriptors)


def listen() -> tuple[socket.socket, Address]:
    """A listening socket under a new name, and what a peer must know to be accepted."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    address = (f"\0pushpull-{secrets.token_hex(16)}", secrets.token_bytes(_TOKEN_BYTES))
    listener.bind(address[0])
    listener.listen(128)
    return listener, address


def connect(address: Address, timeout_s: float) -> "Channel":
    """A channel to whoever listens at ``address``.

    Raises:
        OSError: if nobody does, or not in time.
    """
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        peer.settimeout(timeout_s)
        peer.connect(address[0])
        peer.sendall(address[1])
    except OSError:
        peer.close()
        raise
    return Channel(peer)


class Channel:
    """One side of a connection; each message is one of ``wire``. One thread may send while another one receives.

    The socket never blocks: a message may come in pieces, at any pace, and no peer can hold its other side up longer
    than that one's own deadline.
    """

    def __init__(self, peer: socket.socket) -> None:
        peer.setblocking(False)
        self._socket = peer
        self._room = bytearray(_PIECE)  # a new one for each message would come from the system and go back to it
        self._input = bytearray()
        self._descriptors: list[int] = []
        self._output = bytearray()
        self._poll = select.poll()
        self._poll.register(peer, select.POLLIN)

    @classmethod
    def accept(cls, listener: socket.socket, token: bytes) -> "Channel | None":
        """The next caller, or None if it is another user's or does not know the token."""
        peer, _ = listener.accept()
        try:
            peer.settimeout(_GREETING_S)
            _, user, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if user == os.getuid() and hmac.compare_digest(_read(peer, len(token)), token):
                return cls(peer)
        except (OSError, EOFError):
            pass
        peer.close()
        return None

    def fileno(self) -> int:
        """For ``select``."""
        return self._socket.fileno()

    def send(self, message: Any, descriptors: Sequence[int] = ()) -> None:
        """Send one message; the peer gets descriptors of its own.

        Raises:
            OSError: if the peer is gone, or does not read for 30 s.
        """
        self.send_frame(frame(encode(message), len(descriptors)), descriptors)

    def send_frame(self, whole: bytes, descriptors: Sequence[int] = ()) -> None:
        """As ``send``, for what ``frame`` made."""
        self.post(whole, descriptors)
        while self.pending:
            if not _poll_for(self._socket, select.POLLOUT, _SEND_S):
                raise TimeoutError("the peer does not read")
            self.flush()

    def post(self, whole: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send as much as goes at once of what ``frame`` made; ``flush`` sends what is ``pending`` then.

        Raises:
            OSError: if the peer is gone.
        """
        assert not (descriptors and self._output), "descriptors go with the first byte of their message"
        if self._output:
            self._output += whole
            return
        try:
            sent = (
                socket.send_fds(self._socket, [whole], list(descriptors)) if descriptors else self._socket.send(whole)
            )
        except BlockingIOError:
            assert not descriptors
            sent = 0
        if sent < len(whole):
            self._output += memoryview(whole)[sent:]

    @property
    def pending(self) -> bool:
        """Whether something waits for the peer to read."""
        return bool(self._output)

    @property
    def idle(self) -> bool:
        """Whether nothing is under way, in either direction."""
        return not (self._output or self._input)

    def flush(self) -> None:
        """Send what goes at once of what is pending.

        Raises:
            OSError: if the peer is gone.
        """
        with contextlib.suppress(BlockingIOError):
            while self._output:
                sent = self._socket.send(memoryview(self._output)[: 1 << 20])
                del self._output[:sent]

    def receive(self, timeout_s: float) -> tuple[Any, list[int]]:
        """The next message and the descriptors that came with it, which the caller owns.

        Raises:
            TimeoutError: if none came; what came of it is kept for the next call.
            EOFError: if the peer is gone.
        """
        deadline, found = time.monotonic() + timeout_s, self.arrived()
        while found is None:
            if not self._poll.poll(max(0.0, 1e3 * (deadline - time.monotonic()))):
                raise TimeoutError("no message came")
            found = self.take()
        return found

    def await_input(self, timeout_s: float) -> None:
        """Wait until ``take`` may find something; nothing is taken.

        Raises:
            TimeoutError: if nothing came.
        """
        if not (self._input or self._poll.poll(max(0.0, 1e3 * timeout_s))):
            raise TimeoutError("no message came")

    def take(self) -> tuple[Any, list[int]] | None:
        """As ``receive``, but None where there is no whole message yet.

        Raises:
            EOFError: if the peer is gone.
        """
        while (found := self.arrived()) is None:
            try:
                count, ancillary, _, _ = self._socket.recvmsg_into([self._room], _ANCILLARY_BYTES)
            except BlockingIOError:
                return None
            except ConnectionError:
                raise EOFError("the peer is gone") from None
            if not count:
                raise EOFError("the peer is gone")
            if not (self._input or ancillary) and self._is_whole(count):
                return decode(bytes(self._room[HEADER_BYTES:count])), []
            self._input += memoryview(self._room)[:count]
            for _, _, data in ancillary:  # nothing else than descriptors comes on such a socket
                self._descriptors += array.array("i", data)
        return found

    def _is_whole(self, count: int) -> bool:
        """Whether what was read last is one message and nothing else, and has no descriptors to wait for."""
        return count >= HEADER_BYTES and _HEADER.unpack_from(self._room) == (count - HEADER_BYTES, 0)

    def arrived(self) -> tuple[Any, list[int]] | None:
        """As ``take``, of what was read with the messages before; the socket is not looked at."""
        if len(self._input) < _HEADER.size:
            return None
        length, count = _HEADER.unpack_from(self._input)
        end = _HEADER.size + length
        if len(self._input) < end:
            return None
        message = decode(bytes(memoryview(self._input)[_HEADER.size : end]))
        del self._input[:end]
        descriptors, self._descriptors = self._descriptors[:count], self._descriptors[count:]
        return message, descriptors

    def close(self) -> None:
        """Close this side; another thread that waits for a message gets the end of the connection."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _poll_for(peer: socket.socket, event: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(peer, event)
    return bool(poll.poll(1e3 * timeout_s))


def _read(peer: socket.socket, count: int) -> bytes:
    parts: list[bytes] = []
    while count:
        part = peer.recv(min(count, 1 << 20))
        if not part:
            raise EOFError("the peer is gone")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
