"""Holds servers' arenas for whoever goes on after them: shared memory lasts as long as some process has it open."""

import contextlib
import os
import threading
from contextlib import closing
from typing import NamedTuple

from paramserver.arena import Arena
from paramserver.errors import ServerLost
from paramserver.transport.channel import Address, Channel, connect, listen
from paramserver.transport.wire import Arenas, AskArenas, Failed

__all__ = ["Keeper", "ServerArenas", "claim"]

_ANSWER_S = 10.0


class ServerArenas(NamedTuple):
    """Where one server's versions lie."""

    versions: Arena
    """Both versions of the flat vector; servers of a machine share it."""
    own: Arena
    """The rest; see ``ServerMemory``."""


class Keeper:
    """Keeps arenas of servers of this machine and gives them out; use ``close`` at the end.

    It maps nothing: a descriptor alone costs no memory.
    """

    def __init__(self) -> None:
        self._held: dict[int, list[int]] = {}
        self._listener, self.address = listen()
        self._closed = False
        threading.Thread(target=self._serve, name="keeper", daemon=True).start()

    address: Address
    """Where ``claim`` asks."""

    def keep(self, server: int, hub: Address) -> None:
        """Take the arenas of the server whose hub is at ``hub``, in place of what was held for it.

        Raises:
            ServerLost: if it does not answer.
        """
        try:
            with closing(connect(hub, _ANSWER_S)) as channel:
                _, welcome = channel.receive(_ANSWER_S)
                _close(welcome)
                descriptors = _ask(channel, server)
        except (OSError, EOFError) as error:
            raise ServerLost(f"server {server} is gone: nobody shows its memory", server=server) from error
        old, self._held[server] = self._held.get(server, []), descriptors
        _close(old)

    def _serve(self) -> None:
        while not self._closed:
            try:
                channel = Channel.accept(self._listener, self.address[1])
            except OSError:  # closed
                return
            if channel is not None:
                with contextlib.suppress(OSError, EOFError), closing(channel):
                    self._answer(channel)

    def _answer(self, channel: Channel) -> None:
        message, _ = channel.receive(_ANSWER_S)
        assert isinstance(message, AskArenas)
        if held := self._held.get(message.server):
            channel.send(Arenas(), held)
        else:
            channel.send(Failed(ServerLost(f"nobody has kept the memory of server {message.server}")))

    def close(self) -> None:
        """Hold nothing any more."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(OSError):
            connect(self.address, _ANSWER_S).close()  # wakes the thread
        self._listener.close()
        for descriptors in self._held.values():
            _close(descriptors)
        self._held.clear()


def claim(server: int, keeper: Address) -> ServerArenas:
    """The arenas of a server from the keeper at an address.

    Raises:
        ServerLost: if it does not answer, or has not kept them.
    """
    try:
        with closing(connect(keeper, _ANSWER_S)) as channel:
            versions, own = _ask(channel, server)
    except (OSError, EOFError) as error:
        raise ServerLost(f"the memory of server {server} is gone with its keeper", server=server) from error
    return ServerArenas(Arena.attach(versions), Arena.attach(own))


def _ask(channel: Channel, server: int) -> list[int]:
    channel.send(AskArenas(server))
    while True:
        message, descriptors = channel.receive(_ANSWER_S)
        if isinstance(message, Failed):
            raise message.error
        if isinstance(message, Arenas):
            return descriptors
        _close(descriptors)  # a hub tells its peers of commits, too


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
