"""Backend of ``single``: the same reduction and optimizer on the same layout, in one process, without Ray."""

from collections.abc import Callable

from paramserver.client import Client
from paramserver.messages import Commit
from paramserver.state import State
from paramserver.transport.in_process import InProcessTransport
from workers.local_servers import LocalServers
from workers.param_server import ParamServerBackend
from workers.replica import Replica
from workers.timing import PhaseTimer

__all__ = ["SingleBackend"]


class SingleBackend(ParamServerBackend):
    """A parameter-server worker whose only server lives in its own process.

    Args:
        replica: the model.
        servers: where it is updated.
        num_microbatches: ``M``.
        stop_requested: asked at each commit whether the run is to end there.
        timeout_s: deadline of each wait.
    """

    def __init__(
        self,
        replica: Replica,
        servers: LocalServers,
        num_microbatches: int,
        stop_requested: Callable[[], bool],
        timeout_s: float,
    ) -> None:
        client = Client(0, replica.partition, InProcessTransport(servers.group), timeout_s)
        super().__init__(replica, client, range(num_microbatches), num_microbatches)
        self._servers = servers
        self._stop_requested = stop_requested

    def wait(self, timer: PhaseTimer) -> Commit:
        """See ``Backend.wait``."""
        return super().wait(timer)._replace(stop=self._stop_requested())

    def close(self) -> None:
        """See ``Backend.close``."""
        super().close()
        self._servers.close()

    def state(self) -> State:
        """A copy of everything at the committed version."""
        return self._servers.state()
