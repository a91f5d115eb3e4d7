"""Small messages and file descriptors between two processes of one machine, over a Unix socket.

Addresses are in Linux's abstract namespace: there is no file that could be left behind, and no length limit of a
temporary folder to mind. Both sides must be the same user's, and the caller shows a token before anything it sends is
unpickled.
"""

import hmac
import os
import pickle
import secrets
import select
import socket
import struct
from collections.abc import Sequence
from typing import Any

__all__ = ["Address", "Channel", "connect", "listen"]

_HEADER = struct.Struct("<Q")
_MAX_DESCRIPTORS = 4
_TOKEN_BYTES = 32
_GREETING_S = 10.0

Address = tuple[str, bytes]
"""Name of the socket, and the token that it wants to see."""


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
    """One side of a connection; each message is one pickle."""

    def __init__(self, peer: socket.socket) -> None:
        self._socket = peer

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
            OSError: if the peer is gone.
        """
        self.send_bytes(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL), descriptors)

    def send_bytes(self, payload: bytes, descriptors: Sequence[int] = ()) -> None:
        """As ``send``, for a message that was pickled already."""
        self._socket.settimeout(None)
        frame = _HEADER.pack(len(payload)) + payload
        sent = socket.send_fds(self._socket, [frame], list(descriptors)) if descriptors else 0
        if sent < len(frame):
            self._socket.sendall(frame[sent:] if sent else frame)

    def receive(self, timeout_s: float | None = None) -> tuple[Any, list[int]]:
        """The next message and the descriptors that came with it, which the caller owns.

        Raises:
            TimeoutError: if none came.
            EOFError: if the peer is gone.
        """
        self._socket.settimeout(timeout_s)
        try:
            header, descriptors, _, _ = socket.recv_fds(self._socket, _HEADER.size, _MAX_DESCRIPTORS)
            if len(header) < _HEADER.size:
                header += _read(self._socket, _HEADER.size - len(header))
            return pickle.loads(_read(self._socket, _HEADER.unpack(header)[0])), descriptors
        except ConnectionError as error:
            raise EOFError("the peer is gone") from error

    def has_message(self) -> bool:
        """Whether ``receive`` would return at once."""
        return bool(select.select([self._socket], [], [], 0)[0])

    def may_send(self) -> bool:
        """Whether a small message would go out at once: false once the peer has not read for long."""
        return bool(select.select([], [self._socket], [], 0)[1])

    def close(self) -> None:
        """Close this side."""
        self._socket.close()


def _read(peer: socket.socket, count: int) -> bytes:
    parts: list[bytes] = []
    while count:
        part = peer.recv(min(count, 1 << 20))
        if not part:
            raise EOFError("the peer is gone")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
