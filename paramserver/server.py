"""One server's state: add contributions, sum them along the tree, update, commit, snapshot.

A plain class without processes: whoever owns it calls ``push`` for what arrives, then ``update_part`` for every one of
``ready_parts`` (by several threads, if it likes), and ``commit`` once all are updated. Two versions of everything an
update writes stand side by side (E5): updates write version ``t + 1`` and read ``t``; ``commit`` makes ``t + 1``
visible by writing the version number, last.
"""

import ctypes
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from paramserver.checksums import Checksums, checksums_of
from paramserver.config import OptimizerConfig
from paramserver.errors import VersionGone
from paramserver.fused import Pass, Work
from paramserver.held_slice import HeldSlice, non_finite_gradient
from paramserver.integers import IntegerBlock
from paramserver.messages import Commit, Decision, Hello, Push, Report, pack_commit, unpack_commit
from paramserver.open_step import OpenStep
from paramserver.partition import BUFFERS, Partition
from paramserver.reduction import TreeSum
from paramserver.round_plan import PlannedBucket, PlannedChunk, RoundPlan
from paramserver.scratch import Scratch
from paramserver.server_memory import CHUNK, ServerMemory
from paramserver.state import ServerSnapshot, State, slice_optimizer_state
from paramserver.team import Team

__all__ = ["Server"]


class Server:
    """Holds the slices that ``partition`` gives to server ``index``.

    Args:
        index: which server; server 0 also holds integer buffers and frozen keys.
        partition: the run's partition.
        config: the optimizer.
        num_microbatches: ``M``, the leaves of the canonical tree.
        state: what the run starts from, at any version. Where ``memory`` has a committed version already, that counts,
            and only frozen keys are taken from here.
        run: run id and resume count; pushes with another one are refused.
        memory: where both versions lie; private memory if None.
        generation: of the membership; pushes with an older one are refused.
        verify_every: steps between versions whose checksums go with the commit; 0: never.
        replica: what another process has kept of this server, with its commit: that counts, not ``state``.
    """

    def __init__(
        self,
        index: int,
        partition: Partition,
        config: OptimizerConfig,
        num_microbatches: int,
        state: State,
        run: str = "run",
        memory: ServerMemory | None = None,
        generation: int = 0,
        verify_every: int = 0,
        replica: tuple[ServerSnapshot, Commit | None] | None = None,
    ) -> None:
        self._verify_every = verify_every
        self.index = index
        self.partition = partition
        self.config = config
        integers = IntegerBlock.pack(state.integers if index == 0 else {})
        self.memory = memory or ServerMemory(partition, index, config, num_microbatches, state)
        sums = {piece.index: TreeSum[Tensor](num_microbatches) for piece in partition.by_server[index]}
        self._step = OpenStep(
            f"server {index}",
            partition,
            num_microbatches,
            range(num_microbatches),
            run,
            sums,
            counts_integers=index == 0,
        )
        self._step.generation = generation
        pieces = partition.by_server[index]
        self._slices = {
            piece.index: HeldSlice(piece, partition.pieces[piece.index], self.memory, config, sums[piece.index])
            for piece in pieces
        }
        self._constants = dict(state.constants) if index == 0 else {}
        if not self.memory.filled and replica is not None:
            snapshot, commit = replica
            for piece in pieces:
                self._slices[piece.index].load(snapshot.version, *snapshot.slices[piece.index])
            kept = IntegerBlock.pack(snapshot.integers)
            self.memory.commit(snapshot.version, pack_commit(commit or Commit(snapshot.version, (), 0.0), kept))
        elif not self.memory.filled:
            initial = partition.flatten(state.values)
            for piece in pieces:
                optimizer = slice_optimizer_state(partition, piece.index, state)
                self._slices[piece.index].load(state.version, initial[piece.start : piece.stop], optimizer)
            self.memory.commit(state.version, pack_commit(Commit(state.version, (), 0.0), integers))
        self.version = self.memory.version
        self._integers: dict[int, IntegerBlock] = {}
        self._last: Commit | None = None
        self.record = b""
        """The last commit of this object and the integer buffers of its version; see ``pack_commit``."""
        for version in (self.version - 1, self.version):
            if record := self.memory.record(version):
                self._last, self._integers[version] = record
        self._holds: Counter[int] = Counter()
        self._scratch = self.new_scratch()
        self.open_step()

    def new_scratch(self) -> Scratch:
        """What a thread needs that calls ``update_part``."""
        return Scratch(min(CHUNK, max((held.piece.numel for held in self._slices.values()), default=0)))

    @property
    def last(self) -> Commit | None:
        """The commit of the current version; None if it is the one that the run started from."""
        return self._last if self._last is not None and self._last.stats else None

    def regroup(self, generation: int) -> None:
        """The membership has changed: forget what was pushed to the open step, and refuse what older members push.

        What was updated of it already is written again, to the same bits.
        """
        self._step.generation = generation
        self.open_step()

    def open_step(self) -> None:
        """Forget the step that was committed, or what was pushed to the open one; see ``commit``."""
        self._step.open()
        for held in self._slices.values():
            held.open_step()
        self._decision: Decision | None = None
        self._divisors: tuple[Tensor, Tensor] | None = None

    def hello(self) -> Hello:
        """What a worker checks and takes before its first step."""
        return Hello(
            self._step.run, self._step.generation, self.partition.hash, self.version, self._constants, self.last
        )

    # -- stage 6, aggregate ------------------------------------------------------------------------------------------

    def push(self, push: Push) -> None:
        """Take a contribution in; see ``OpenStep.push``."""
        self._step.push(push, self.version)

    @property
    def counted(self) -> bool:
        """Whether the rows of all microbatches are known: what a sum is divided by."""
        return self._step.counted

    @property
    def complete(self) -> bool:
        """Whether every slice has all contributions to the open step."""
        return self._step.complete

    @property
    def may_write(self) -> bool:
        """Whether nobody holds the version that an update would overwrite."""
        return not self._holds[self.version - 1]

    @property
    def ready(self) -> bool:
        """Whether the whole step may be updated."""
        return self.complete and self.may_write

    @property
    def undecided(self) -> bool:
        """Whether a vote is needed for the open step, and was not taken."""
        return self.config.needs_vote and self._decision is None

    def ready_parts(self) -> list[tuple[int, int]]:
        """(slice, part of it) that may be updated now and were not yet; with a vote none before it was taken."""
        if self.undecided or not (self.counted and self.may_write):
            return []
        ready = [(i, held) for i, held in self._slices.items() if self._step.is_whole(i) and not held.updated]
        return [(index, part) for index, held in ready for part in held.parts]

    def missing(self) -> list[int]:
        """Microbatches of the open step that some slice still waits for."""
        return self._step.missing()

    def _divisor(self, held: HeldSlice) -> Tensor:
        """What the sum of a slice is divided by: all weights, or all samples for buffers; at least 1."""
        if self._divisors is None:
            # In microbatch order, not in that of arrival: weights need not be whole numbers. And tensors, not
            # numbers: by a number CUDA multiplies with the reciprocal, which is another result.
            rows = [row for _, row in sorted(self._step.stats.items())]
            weight, samples = sum(row.weight for row in rows), sum(row.samples for row in rows)
            self._divisors = (_divisor(weight), _divisor(samples))
        return self._divisors[held.piece.group == BUFFERS]

    def report(self) -> Report:
        """This server's norms for the vote; keeps the mean gradients until the update."""
        assert self.complete
        rows: list[tuple[int, int, str, float]] = []
        for held in self._slices.values():
            if held.piece.group != BUFFERS:
                rows.extend(held.squared_norms(self._divisor(held), self._scratch))
        return Report(self.index, self.version, tuple(rows))

    # -- stage 7, update ---------------------------------------------------------------------------------------------

    def vote(self, ask: Callable[[Report], Decision]) -> None:
        """Take the vote, if it is due: ``ask`` gives all servers' decision for this server's report."""
        if self.undecided and self.ready:
            self.decide(ask(self.report()))

    def decide(self, decision: Decision) -> None:
        """Take the vote's result; from now on slices may be updated.

        Raises:
            NonFiniteGradient: with ``on_nan="stop"``; the committed version stands.
        """
        if not decision.apply and self.config.on_nan == "stop":
            raise non_finite_gradient(str(decision.key), self.version + 1)
        self._decision = decision

    def update_part(self, index: int, part: int, scratch: Scratch | None = None) -> bool:
        """Write version ``version + 1`` of one of ``ready_parts``; different ones may be updated at once.

        Returns:
            whether the whole slice has that version now.

        Raises:
            NonFiniteGradient: with ``on_nan="stop"``; the committed version stands.
        """
        self.memory.begin(self.version + 1)
        held, decision = self._slices[index], self._decision
        if decision is not None and not decision.apply:
            if part == 0:
                held.skip(self.version)
            return held.updated
        scale = None if decision is None or held.piece.group == BUFFERS else decision.scale
        lr = self.config.learning_rate(self.version)
        held.update(part, self.version, self._divisor(held), lr, scratch or self._scratch, scale)
        return held.updated

    def update_together(
        self, parts: Sequence[tuple[int, int]], team: Team, scratches: Sequence[Scratch]
    ) -> list[tuple[int, int]]:
        """``update_part`` of what can be done in one pass, by all of a team at once; gives the rest.

        Nobody needs the interpreter in between, and no thread is done long before the others, however few parts
        there are.

        Args:
            parts: of ``ready_parts``.
            team: the threads.
            scratches: of each thread.
        """
        if self._decision is not None:
            return list(parts)
        lr = self.config.learning_rate(self.version)
        rest: list[tuple[int, int]] = []
        taken: list[tuple[HeldSlice, int]] = []
        chunks: dict[int, tuple[Pass, list[ctypes.Structure]]] = {}
        for index, part in parts:
            held = self._slices[index]
            if (found := held.in_one_pass(part, self.version, float(self._divisor(held)), lr)) is None:
                rest.append((index, part))
                continue
            taken.append((held, part))
            function, chunk = found
            chunks.setdefault(id(function), (function, []))[1].append(chunk)
        if not taken:
            return rest
        self.memory.begin(self.version + 1)
        works = [Work(function, of_pass) for function, of_pass in chunks.values()]

        def share(thread: int) -> None:
            begin = time.perf_counter()
            for work in works:
                work()
            scratches[thread].busy["update"] += time.perf_counter() - begin

        team.run(share)
        finite = all(work.finite for work in works)
        for held, part in taken:
            # Which one it was is seen from the sum again: this happens once in a run.
            held.end_pass(part, self.version, scratches[0], finite=finite)
        return rest

    def update(self, decision: Decision | None = None) -> None:
        """Write version ``version + 1`` of every slice; ``decision`` is the vote's, None where none is needed."""
        assert self.ready
        if decision is not None:
            self.decide(decision)
        for index, part in self.ready_parts():
            self.update_part(index, part)

    # -- stage 8, commit ---------------------------------------------------------------------------------------------

    @property
    def updated(self) -> bool:
        """Whether ``commit`` may follow; a server without slices waits for the rows and the vote like the others."""
        return self.counted and not self.undecided and all(held.updated for held in self._slices.values())

    def commit(
        self,
        busy: Iterable[Mapping[str, float]] = (),
        *,
        stop: bool = False,
        leave: bool = False,
        open_next: bool = True,
    ) -> Commit:
        """Make what was updated the current version.

        Args:
            busy: seconds by stage, of each thread that worked beside this object's own.
            stop: whether it is the run's last.
            leave: whether workers are to come back after it.
            open_next: whether the next step is opened at once; if not, ``open_step`` must follow before anything else
                does, and whoever waits for the commit can be told of it first.
        """
        assert self.updated, "commit before update"
        applied = self._decision is None or self._decision.apply
        begin = time.perf_counter()
        old = self._integers[self.version]
        integers = old.updated(self._step.integers) if applied else old
        stages = [self._scratch.take_busy(), *busy]
        commit = Commit(
            version=self.version + 1,
            stats=tuple(row for _, row in sorted(self._step.stats.items())),
            lr=self.config.learning_rate(self.version),
            skipped=not applied,
            grad_norm=self._decision.norm if self._decision else None,
            scale=self._decision.scale if self._decision else 1.0,
            server_ms={stage: 1e3 * sum(thread.get(stage, 0.0) for thread in stages) for stage in stages[0]},
            last_worker=self._step.last_worker,
            stop=stop,
            leave=leave,
            checksums=self._checksums(self.version + 1),
            generation=self._step.generation,
        )
        commit = commit._replace(server_ms={**commit.server_ms, "commit": 1e3 * (time.perf_counter() - begin)})
        self.record = pack_commit(commit, integers)
        self.memory.commit(commit.version, self.record)
        self._advance(commit, integers)
        if open_next:
            self.open_step()
        return commit

    def plan(self, buckets: Sequence[Sequence[Push]]) -> RoundPlan | None:
        """What the update and the commit of the open step will be if exactly such contributions are pushed to it.

        Whoever carries it out, and says so with ``conclude``, has seen that what is pushed differs from ``buckets`` in
        losses, weights, samples and the content of integer buffers alone, which agree. Nothing is written here.

        Args:
            buckets: pushes to the open step, one of each contributor in each bucket, of the same slices; together the
                buckets must hold all slices once.

        Returns:
            None where it needs more than one pass over memory, or it is not known what that is.
        """
        version, due = self.version, self._verify_every
        started = bool(self._step.stats) or self._begun
        if started or self.config.needs_vote or not (self.may_write and self._slices and self.memory.filled):
            return None
        if due and (version + 1) % due == 0:
            return None
        pushes = [push for bucket in buckets for push in bucket]
        nodes = sorted(push.node for push in buckets[0])
        microbatches = [index for node in nodes for index in range(node.lo, node.hi)]
        integers = self._integers[version]
        agree = all(IntegerBlock.of(push.integers).layout == integers.layout for push in pushes)
        if microbatches != list(range(self._step.num_microbatches)) or not agree:
            return None
        if sorted(index for bucket in buckets for index in bucket[0].slices) != sorted(self._slices):
            return None
        lr = self.config.learning_rate(version)
        planned: list[PlannedBucket] = []
        for bucket in buckets:
            if (found := self._plan_bucket(bucket, lr)) is None:
                return None
            planned.append(found)
        for push in pushes:
            self._step.check(push, version)
        rows = {row.microbatch: row for push in buckets[0] for row in push.stats}
        times = dict.fromkeys((*self._scratch.busy, "commit"), 0.0)
        stats = tuple(rows[index] for index in microbatches)
        record = pack_commit(
            Commit(version + 1, stats, lr, server_ms=times, last_worker=0, generation=self._step.generation), integers
        )
        return RoundPlan(version + 1, planned, record, *self.memory.record_places(version + 1, len(record)))

    def _plan_bucket(self, pushes: Sequence[Push], lr: float) -> PlannedBucket | None:
        chunks: list[PlannedChunk] = []
        slices = tuple(pushes[0].slices)
        for index in slices:
            contributions = {push.node: push.slices[index] for push in pushes if index in push.slices}
            planned = self._slices[index].plan(contributions, self.version, lr)
            if planned is None:
                return None
            chunks += planned
        return PlannedBucket(slices, chunks)

    def conclude(self, pushes: Sequence[Push], record: bytes) -> Commit:
        """What ``plan`` gave was carried out: the version stands in memory, with its commit's record.

        ``open_step`` must follow before anything else does.

        Args:
            pushes: what came.
            record: what was kept.
        """
        for push in pushes:
            self.push(push)
        assert self.complete, "a round was carried out without all contributions"
        for held in self._slices.values():
            held.end_planned()
        commit, integers = unpack_commit(record)
        self.record = record
        self._advance(commit, integers)
        return commit

    def _advance(self, commit: Commit, integers: IntegerBlock) -> None:
        self._integers = {self.version: self._integers[self.version], commit.version: integers}
        self.version = commit.version
        self._last = commit

    def interrupt(self, slices: Iterable[int]) -> None:
        """What ``plan`` gave was given up in the middle.

        Args:
            slices: that stand at the next version already; what was pushed of them is still to be heard of.
        """
        for index in slices:
            self._slices[index].end_planned()

    def _checksums(self, version: int) -> Checksums:
        if not self._verify_every or version % self._verify_every:
            return ()
        return checksums_of(self.partition, self.memory.vectors[version % 2], self.partition.by_server[self.index])

    # -- reading -----------------------------------------------------------------------------------------------------

    def values(self, version: int) -> list[Tensor]:
        """The slices at ``version``, in the partition's order; live memory, overwritten by the update after next.

        Raises:
            VersionGone: if the version is not the committed one or a held one.
        """
        self._check_readable(version)
        return [held.values[version % 2] for held in self._slices.values()]

    def flat(self, version: int) -> Tensor:
        """The flat (length,) vector at ``version``, of which this server's slices are valid; see ``values``."""
        self._check_readable(version)
        return self.memory.vectors[version % 2]

    def integers(self, version: int) -> IntegerBlock:
        """Integer and boolean buffers at ``version``; not to be written."""
        self._check_readable(version)
        return self._integers[version]

    def hold(self, version: int, *, once: bool = False) -> None:
        """Keep ``version`` until ``release``: the update that would overwrite it waits.

        Args:
            version: which.
            once: whether to do nothing if it is held already.
        """
        self._check_readable(version)
        if not (once and self._holds[version]):
            self._holds[version] += 1

    def release(self, version: int) -> None:
        """Give a held version free; one that is not held stays so."""
        self._holds[version] = max(0, self._holds[version] - 1)

    def snapshot(self, version: int, *, copy: bool = True) -> ServerSnapshot:
        """Everything at ``version``; without ``copy`` only until the next update."""
        self._check_readable(version)
        return ServerSnapshot(
            version=version,
            slices={index: held.snapshot(version, copy=copy) for index, held in self._slices.items()},
            integers={name: value.clone() for name, value in self._integers[version].items()},
            constants=self._constants,
        )

    def readable(self, version: int) -> bool:
        """Whether ``version`` stands here: the committed one, and the one before until the open step is updated."""
        if version == self.version or self._holds[version]:
            return True
        return version == self.version - 1 and version in self._integers and not self._begun

    @property
    def _begun(self) -> bool:
        """Whether something of the next version was written, by this object or by one before it on the same memory."""
        return self.memory.begun > self.version

    def _check_readable(self, version: int) -> None:
        if not self.readable(version):
            raise VersionGone(f"server {self.index} has version {self.version}, not {version}")


def _divisor(count: float) -> Tensor:
    return torch.tensor(max(1.0, float(count)), dtype=torch.float32)
