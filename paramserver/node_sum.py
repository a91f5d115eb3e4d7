"""Stage 4 on a node: what its workers pushed to a server elsewhere is summed here, so that it goes over the wire once.

To a ``Hub``, and so to the node's workers, this is that server: they push, wait and read as they do with a server of
their own node. What goes on are the maximal tree nodes inside the node's run of microbatches, slice by slice as each
is whole; what comes back is written once, for all workers of the node.
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from paramserver.integers import IntegerBlock
from paramserver.messages import Commit, Hello, Push, pack_commit
from paramserver.open_step import OpenStep
from paramserver.partition import Partition, Slice
from paramserver.reduction import Node, TreeSum, maximal_nodes
from paramserver.round_plan import RoundPlan
from paramserver.scratch import Scratch
from paramserver.server_memory import CHUNK
from paramserver.team import Team

__all__ = ["NodeSum"]

_NO_SLICE = -1


class NodeSum:
    """Sums the slices of one server over the workers of one node.

    Args:
        index: which server.
        partition: the run's partition.
        num_microbatches: ``M``, the leaves of the canonical tree.
        run: the node's microbatches.
        hello: what the server says of itself.
        integers: integer buffers of the versions that ``memory`` holds already: the server's and, where a server is one
            version ahead of others, the one before.
        memory: two flat (length,) fp32 vectors, for versions ``v % 2``: the node's. That of the server's version holds
            its slices already.
        forward: called with each push that is to go on, by the threads that sum; its tensors stay as they are until
            ``arrive`` is called.
    """

    def __init__(
        self,
        index: int,
        partition: Partition,
        num_microbatches: int,
        run: range,
        hello: Hello,
        integers: Mapping[int, IntegerBlock],
        memory: tuple[Tensor, Tensor],
        forward: Callable[[Push], None],
    ) -> None:
        self.index = index
        self.partition = partition
        self.version = hello.version
        self._hello = hello
        self._integers = dict(integers)
        self._memory = memory
        self._forward = forward
        self._pieces = {piece.index: piece for piece in partition.by_server[index]}
        self._sums = {piece: TreeSum[Tensor](num_microbatches) for piece in self._pieces}
        self._step = OpenStep(
            f"server {index}",
            partition,
            num_microbatches,
            run,
            hello.run,
            self._sums,
            counts_integers=index == 0,
        )
        self._nodes = maximal_nodes(run.start, run.stop, num_microbatches)
        length = sum(piece.numel for piece in self._pieces.values())
        flats = [torch.empty(length) for _ in self._nodes]
        self._results: dict[int, dict[Node, Tensor]] = {}
        start = 0
        for piece in self._pieces.values():
            self._results[piece.index] = {
                node: flat[start : start + piece.numel] for node, flat in zip(self._nodes, flats, strict=True)
            }
            start += piece.numel
        self._step.generation = hello.generation
        self.last = hello.last
        """The commit of ``version``; None if the run started from it."""
        self._lock = threading.Lock()
        self.open_step()

    def open_step(self) -> None:
        """Forget the step that was committed; see ``commit``."""
        self._step.open()
        self._handed_out: set[int] = set()
        self._parts_left = {index: len(self._parts(index)) for index in self._pieces}
        self._arrived: tuple[Commit, IntegerBlock] | None = None

    def _parts(self, index: int) -> range:
        return range(-(-self._pieces[index].numel // CHUNK))

    def new_scratch(self) -> Scratch:
        """What a thread needs that calls ``update_part``."""
        return Scratch(CHUNK)

    def hello(self) -> Hello:
        """What the server said of itself."""
        return self._hello._replace(version=self.version, last=self.last)

    def push(self, push: Push) -> None:
        """Take a worker's contribution in; see ``OpenStep.push``."""
        self._step.push(push, self.version)

    def missing(self) -> list[int]:
        """Microbatches of this node that some slice still waits for."""
        return self._step.missing()

    def ready_parts(self) -> list[tuple[int, int]]:
        """(slice, part of it) that all workers of this node have contributed to; each is given once."""
        if not self._step.counted:
            return []
        ready = [index for index in self._pieces if index not in self._handed_out and self._step.is_whole(index)]
        self._handed_out.update(ready)
        if not self._pieces and _NO_SLICE not in self._handed_out:
            self._handed_out.add(_NO_SLICE)
            self._send({node: {} for node in self._nodes})  # a server without slices wants the rows
        return [(index, part) for index in ready for part in self._parts(index)]

    def update_part(self, index: int, part: int, scratch: Scratch) -> bool:
        """Sum one part over this node's workers; the last part of a slice sends the slice on.

        Returns:
            False: the slice has no new version before ``write``.
        """
        begin = time.perf_counter()
        lo, hi = part * CHUNK, min((part + 1) * CHUNK, self._pieces[index].numel)
        for node in self._nodes:
            scratch.sum(self._sums[index], lo, hi, node, self._results[index][node][lo:hi])
        scratch.busy["aggregate"] += time.perf_counter() - begin
        with self._lock:
            self._parts_left[index] -= 1
            last = not self._parts_left[index]
        if last:
            self._send({node: {index: self._whole(index, node)} for node in self._nodes})
        return False

    def update_together(
        self, parts: Sequence[tuple[int, int]], team: Team, scratches: Sequence[Scratch]
    ) -> list[tuple[int, int]]:
        """See ``Server.update_together``: here each slice goes on as soon as it is summed."""
        return list(parts)

    def _whole(self, index: int, node: Node) -> Tensor:
        vectors, additions = self._sums[index].plan(node)
        return self._results[index][node] if additions else vectors[0]

    def _send(self, slices: Mapping[Node, Mapping[int, Tensor]]) -> None:
        for node, held in slices.items():
            push = Push(
                run=self._hello.run,
                step=self.version,
                generation=self._hello.generation,
                worker=self._step.last_worker or 0,
                node=node,
                slices=held,
                stats=tuple(self._step.stats[microbatch] for microbatch in range(node.lo, node.hi)),
                integers=self._step.integers,
            )
            self._forward(push)

    @property
    def pushes(self) -> int:
        """How often ``forward`` is called in a step."""
        return max(1, len(self._pieces)) * len(self._nodes)

    def write(self, version: int, values: Mapping[int, Tensor]) -> list[Slice]:
        """The server has updated slices, given by index: write them at the version that it will commit.

        Any thread may call it: nobody reads that version yet, and all workers of the node have pushed these slices.
        """
        pieces = [self._pieces[index] for index in values]
        for piece in pieces:
            self._memory[version % 2][piece.start : piece.stop].copy_(values[piece.index])
        return pieces

    def arrive(self, commit: Commit, integers: Mapping[str, Tensor]) -> None:
        """The server has committed the open step, and all of its slices were written here."""
        self._arrived = (commit, IntegerBlock.pack(integers))

    @property
    def updated(self) -> bool:
        """Whether ``commit`` may follow: the new version is here."""
        return self._arrived is not None

    def commit(
        self,
        busy: Iterable[Mapping[str, float]] = (),
        *,
        stop: bool = False,
        leave: bool = False,
        open_next: bool = True,
    ) -> Commit:
        """Make what arrived the current version, the time spent summing here added; see ``Server.commit``."""
        assert self._arrived is not None
        commit, integers = self._arrived
        before = {version: held for version, held in self._integers.items() if version == self.version}
        self.version = commit.version
        self._integers = {**before, self.version: integers}
        if open_next:
            self.open_step()
        here = {stage: 1e3 * sum(thread.get(stage, 0.0) for thread in busy) for stage in commit.server_ms}
        busy_ms = {name: value + here[name] for name, value in commit.server_ms.items()}
        self.last = commit._replace(server_ms=busy_ms, stop=stop or commit.stop, leave=leave or commit.leave)
        return self.last

    @property
    def record(self) -> bytes:
        """See ``Server.record``."""
        assert self.last is not None
        return pack_commit(self.last, self._integers[self.version])

    def plan(self, buckets: Sequence[Sequence[Push]]) -> RoundPlan | None:
        """See ``Server.plan``: here a step is not over when all have pushed."""
        return None

    def conclude(self, pushes: Sequence[Push], record: bytes) -> Commit:
        """Nothing was planned."""
        raise AssertionError("nothing was planned")

    def interrupt(self, slices: Iterable[int]) -> None:
        """Likewise."""

    def readable(self, version: int) -> bool:
        """Whether ``version`` stands here: the committed one, and one that came before anything was pushed here."""
        return version in self._integers and (version == self.version or not self._step.stats)

    def integers(self, version: int) -> IntegerBlock:
        """Integer and boolean buffers at a readable version."""
        return self._integers[version]

    def regroup(self, generation: int) -> None:
        """A change of the membership gives every node another run, so it makes new objects of this class."""
        raise AssertionError("a node's sum is made anew")
