"""An actor on another node that has each committed version of some servers, too: for when a node is lost."""

from cluster.place import Place, place_of_process, prepare_process
from paramserver.errors import VersionGone
from paramserver.messages import Commit
from paramserver.state import ServerSnapshot

__all__ = ["ReplicaActor"]

_KEPT = 2


class ReplicaActor:
    """Keeps the last two committed versions of servers of other nodes."""

    def __init__(self) -> None:
        prepare_process()
        self._held: dict[int, dict[int, tuple[ServerSnapshot, Commit | None]]] = {}

    def place(self) -> Place:
        """Where this replica runs."""
        return place_of_process()

    def store(self, server: int, snapshot: ServerSnapshot, commit: Commit | None) -> None:
        """Take a committed version in; nobody hears of it before."""
        held = self._held.setdefault(server, {})
        held[snapshot.version] = (snapshot, commit)
        for version in sorted(held)[:-_KEPT]:
            del held[version]

    def newest(self, server: int) -> tuple[ServerSnapshot, Commit | None]:
        """The newest version of a server.

        Raises:
            VersionGone: if there is none.
        """
        held = self._held.get(server, {})
        if not held:
            raise VersionGone(f"no replica of server {server} is here")
        return held[max(held)]
