"""The seam between a worker's client and its servers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from paramserver.messages import Commit, Hello, Push
from paramserver.partition import Slice

__all__ = ["Carrier", "Transport"]


class Transport(Protocol):
    """Carries pushes to servers and versions back; one object a worker.

    A push may arrive late, twice or in any order: servers sort that out. Errors of a server are raised here, by the
    next call, as the class the server raised.
    """

    num_servers: int

    @property
    def versions(self) -> tuple[Tensor, Tensor] | None:
        """Where all servers keep version ``v`` of the whole flat vector, at ``v % 2``, if it can be read in place.

        It stays as ``fetch`` says, and must not be written.
        """

    def hello(self, server: int, timeout_s: float) -> Hello:
        """What the server says of itself."""

    def allocate(self, numel: int) -> Tensor:
        """A zeroed (numel,) fp32 vector in memory from which pushes go without a copy, as long as this object lives."""

    def push(self, server: int, push: Push) -> None:
        """Send a contribution. Its tensors may be overwritten once ``wait`` has returned the step's commit."""

    def prepare(self, server: int, push: Push) -> Callable[[], None]:
        """Do now what can be done of ``push``: calling the result does the rest.

        Until then the tensors may be written, and after it as for ``push``; all else that is pushed stands already.
        """

    def wait(self, server: int, version: int, timeout_s: float) -> Commit:
        """Wait until the server has committed ``version``.

        Raises:
            StepTimeout: naming what the server still waits for.
        """

    def await_slices(self, version: int, pieces: Sequence[Slice], timeout_s: float) -> None:
        """Wait until slices stand in ``versions`` at the version that is committed next: each has it before that.

        Raises:
            StepTimeout: naming what a server still waits for.
        """

    def fetch(self, server: int, version: int, timeout_s: float) -> tuple[Sequence[Tensor], Mapping[str, Tensor]]:
        """The server's slices and integer buffers at a committed version; not to be written.

        The tensors stay valid until this worker has pushed its contribution to the step that follows.
        """

    def note(self, worker: int, word: int) -> None:
        """Leave word of where a worker is, for whoever wonders why it is late; lost where no memory is shared."""

    def close(self) -> None:
        """Give everything back that this object holds."""


class Carrier(Transport, Protocol):
    """A transport to servers of other machines, from which slices come as soon as each is updated."""

    def arrivals(self, server: int, version: int, timeout_s: float) -> Iterator[Mapping[int, Tensor]]:
        """Slices of the server by index, a few at a time, until ``version`` is committed and all have come.

        Afterwards ``wait`` and ``fetch`` answer at once. Pushes may go on meanwhile, from another thread.

        Raises:
            StepTimeout: naming what the server still waits for.
        """
