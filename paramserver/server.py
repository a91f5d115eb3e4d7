"""One server's state: add contributions, sum them along the tree, update, commit, snapshot.

A plain class without threads or processes: whoever owns it calls ``push`` for what arrives, then ``update`` and
``commit`` once ``ready``. Two versions of everything an update writes stand side by side (E5): ``update`` writes
version ``t + 1`` and reads ``t``; ``commit`` makes ``t + 1`` visible by writing the version number, last.
"""

import math
import time
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from paramserver.config import OptimizerConfig
from paramserver.errors import (
    NonFiniteGradient,
    PartitionMismatch,
    PushRefused,
    ReplicaMismatch,
    StaleContribution,
    VersionGone,
)
from paramserver.messages import Commit, Decision, Hello, MicrobatchStats, Push, Report
from paramserver.optimizer import SliceOptimizer, build_slice_optimizer
from paramserver.partition import BUFFERS, Partition, Slice
from paramserver.reduction import TreeSum
from paramserver.scratch import Scratch
from paramserver.state import ServerSnapshot, SliceSnapshot, State, slice_optimizer_state

__all__ = ["Server"]


class Server:
    """Holds the slices that ``partition`` gives to server ``index``.

    Args:
        index: which server; server 0 also holds integer buffers and frozen keys.
        partition: the run's partition.
        config: the optimizer.
        num_microbatches: ``M``, the leaves of the canonical tree.
        state: what the run starts from, at any version.
        run: run id and resume count; pushes with another one are refused.
    """

    def __init__(
        self,
        index: int,
        partition: Partition,
        config: OptimizerConfig,
        num_microbatches: int,
        state: State,
        run: str = "run",
    ) -> None:
        self.index = index
        self.partition = partition
        self.config = config
        self.generation = 0
        self.version = state.version
        self._run = run
        self._num_microbatches = num_microbatches
        self._slices = partition.by_server[index]
        initial = partition.flatten(state.values)
        own = torch.cat([initial[piece.start : piece.stop] for piece in self._slices] or [initial[:0]])
        self._flat = (own, own.clone())
        self._values = self._carve()
        self._optimizers = {
            piece.index: self._optimizer(piece, state) for piece in self._slices if piece.group != BUFFERS
        }
        self._integers = [dict(state.integers), dict(state.integers)] if index == 0 else [{}, {}]
        self._constants = dict(state.constants) if index == 0 else {}
        self._holds: Counter[int] = Counter()
        self._scratch = Scratch(max((piece.numel for piece in self._slices), default=0))
        self._means: dict[int, Tensor] = {}
        self._commit: Commit | None = None
        self._open_step()

    def _carve(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Views of both versions by slice: the slices of a server lie one after the other."""
        views, start = {}, 0
        for piece in self._slices:
            stop = start + piece.numel
            views[piece.index] = (self._flat[0][start:stop], self._flat[1][start:stop])
            start = stop
        return views

    def _optimizer(self, piece: Slice, state: State) -> SliceOptimizer:
        factor = self.config.lr_factor(self.partition.pieces[piece.index][0][0].name)
        optimizer = build_slice_optimizer(self._values[piece.index], self.config, factor)
        optimizer.load_state(state.version, slice_optimizer_state(self.partition, piece.index, state))
        return optimizer

    def _open_step(self) -> None:
        self._sums = {piece.index: TreeSum[Tensor](self._num_microbatches) for piece in self._slices}
        self._stats: dict[int, MicrobatchStats] = {}
        self._new_integers: dict[str, Tensor] = {}
        self._last_worker: int | None = None
        self._busy = {"aggregate": 0.0, "update": 0.0, "commit": 0.0}

    def hello(self) -> Hello:
        """What a worker checks and takes before its first step."""
        return Hello(self._run, self.generation, self.partition.hash, self.version, self._constants)

    # -- stage 6, aggregate ------------------------------------------------------------------------------------------

    def push(self, push: Push) -> None:
        """Take a contribution in; a repetition is ignored. Nothing is changed if it raises.

        The tensors are read until the step is committed, and never written.

        Raises:
            StaleContribution: an earlier step, generation or run. A repetition of the step just committed is
                answered: transports may deliver twice, and late.
            PushRefused: the step is not open yet.
            PartitionMismatch: a slice that is not here, or has another size or dtype.
            OverlappingContribution: the node is not one of the tree.
            ReplicaMismatch: integer buffers differ from those of another microbatch.
        """
        if (push.run, push.generation, push.step) == (self._run, self.generation, self.version - 1):
            return
        self._check(push)
        if self.index == 0:
            self._agree(push.integers, push)
        fresh = [self._sums[index].insert(push.node, values) for index, values in push.slices.items()]
        if fresh and not any(fresh):
            return
        if self.index == 0:
            self._new_integers.update((name, value.clone()) for name, value in push.integers.items())
        self._stats.update((row.microbatch, row) for row in push.stats)
        self._last_worker = push.worker

    def _check(self, push: Push) -> None:
        who = f"push of worker {push.worker} for step {push.step}"
        if push.run != self._run or push.generation < self.generation:
            raise StaleContribution(f"{who} is of run {push.run}, generation {push.generation}, an earlier one")
        if push.step < self.version:
            raise StaleContribution(f"{who}: server {self.index} has committed version {self.version} already")
        if push.step > self.version:
            raise PushRefused(f"{who}: server {self.index} is at version {self.version}, the step is not open yet")
        for index, values in push.slices.items():
            if index not in self._sums:
                raise PartitionMismatch(f"{who}: slice {index} is not on server {self.index}")
            wanted = self.partition.slices[index].numel
            if values.dtype != torch.float32 or values.shape != (wanted,):
                raise PartitionMismatch(
                    f"{who}: slice {index} is {values.dtype} of shape {tuple(values.shape)}, wanted float32 ({wanted},)"
                )
        if [row.microbatch for row in push.stats] != list(range(push.node.lo, push.node.hi)):
            raise PartitionMismatch(f"{who}: its rows are not those of microbatches [{push.node.lo}, {push.node.hi})")

    def _agree(self, integers: Mapping[str, Tensor], push: Push) -> None:
        for name, value in integers.items():
            known = self._new_integers.get(name, value)
            if not torch.equal(known, value):
                raise ReplicaMismatch(
                    f"buffer {name!r} differs between the microbatches of step {push.step} ({known} and {value}): "
                    "an integer buffer must become the same in every microbatch"
                )

    @property
    def complete(self) -> bool:
        """Whether every slice has all contributions to the open step."""
        return len(self._stats) == self._num_microbatches and all(tree.complete for tree in self._sums.values())

    @property
    def ready(self) -> bool:
        """Whether ``update`` may run: complete, and nobody holds the version that it would overwrite."""
        return self.complete and not self._holds[self.version - 1]

    def missing(self) -> list[int]:
        """Microbatches of the open step that some slice still waits for."""
        return sorted({index for tree in self._sums.values() for index in tree.missing()})

    def _mean(self, piece: Slice, out: Tensor | None = None) -> Tensor:
        """Root of the tree / total weight, in scratch memory that the next call may use again, or in ``out``."""
        total = self._sums[piece.index].reduce(self._scratch.add)
        # In microbatch order, not in that of arrival: weights need not be whole numbers.
        rows = (self._stats[index] for index in range(self._num_microbatches))
        count = sum(row.samples if piece.group == BUFFERS else row.weight for row in rows)
        # A tensor, not a number: by a number CUDA multiplies with the reciprocal, which is another result.
        divisor = torch.tensor(max(1.0, float(count)), dtype=torch.float32, device=total.device)
        return torch.div(total, divisor, out=self._scratch.take(piece.numel) if out is None else out)

    def report(self) -> Report:
        """This server's norms for the vote; keeps the mean gradients until ``update``."""
        start = time.perf_counter()
        rows: list[tuple[int, int, str, float]] = []
        for piece in self._slices:
            if piece.group == BUFFERS:
                continue
            mean = self._means[piece.index] = self._mean(piece, torch.empty(piece.numel))
            self._scratch.reset()
            rows.extend(
                (key.offset, piece.start + first, key.name, _squared_norm(mean[first:last]))
                for key, first, last in self.partition.pieces[piece.index]
            )
        self._busy["aggregate"] += time.perf_counter() - start
        return Report(self.index, tuple(rows))

    # -- stage 7, update ---------------------------------------------------------------------------------------------

    def update(self, decision: Decision | None = None) -> None:
        """Write version ``version + 1`` of every slice; ``decision`` is the vote's, None where none is needed.

        Raises:
            NonFiniteGradient: with ``on_nan="stop"``; the committed version stands.
        """
        assert self.ready
        if decision is not None and not decision.apply and self.config.on_nan == "stop":
            raise self._non_finite(str(decision.key))
        for piece in self._slices:
            self._scratch.reset()
            if decision is not None and not decision.apply:
                self._skip(piece)
            elif piece.group == BUFFERS:
                old, new = self._versions(piece.index)
                torch.add(old, self._mean(piece), out=new)
            else:
                self._update_slice(piece, decision)
        self._means.clear()
        self._integers[(self.version + 1) % 2] = {**self._integers[self.version % 2], **self._new_integers}
        self._commit = self._make_commit(decision)

    def _update_slice(self, piece: Slice, decision: Decision | None) -> None:
        begin = time.perf_counter()
        mean = self._means[piece.index] if decision else self._mean(piece)
        summed = time.perf_counter()
        if decision is None:
            self._refuse_non_finite(piece, mean)
        elif decision.scale != 1.0:
            mean.mul_(decision.scale)
        self._optimizers[piece.index].step(self.version, mean, self.config.learning_rate(self.version))
        self._busy["aggregate"] += summed - begin
        self._busy["update"] += time.perf_counter() - summed

    def _skip(self, piece: Slice) -> None:
        if piece.group == BUFFERS:
            old, new = self._versions(piece.index)
            new.copy_(old)
        else:
            self._optimizers[piece.index].skip(self.version)
        self._new_integers.clear()

    def _refuse_non_finite(self, piece: Slice, mean: Tensor) -> None:
        # A sum is far cheaper than isfinite; it may overflow by itself, so that is looked at again.
        if math.isfinite(float(mean.sum())):
            return
        for key, first, last in self.partition.pieces[piece.index]:
            if not bool(torch.isfinite(mean[first:last]).all()):
                raise self._non_finite(key.name)

    def _non_finite(self, key: str) -> NonFiniteGradient:
        return NonFiniteGradient(
            f"gradient of {key!r} is not finite in step {self.version + 1}: lower --lr, set --clip-grad-norm, "
            "or drop such steps with --on-nan skip",
            key=key,
            step=self.version + 1,
        )

    def _versions(self, index: int) -> tuple[Tensor, Tensor]:
        pair = self._values[index]
        return pair[self.version % 2], pair[(self.version + 1) % 2]

    # -- stage 8, commit ---------------------------------------------------------------------------------------------

    def _make_commit(self, decision: Decision | None) -> Commit:
        return Commit(
            version=self.version + 1,
            stats=tuple(self._stats[index] for index in sorted(self._stats)),
            lr=self.config.learning_rate(self.version),
            skipped=decision is not None and not decision.apply,
            grad_norm=decision.norm if decision else None,
            server_ms={stage: 1e3 * seconds for stage, seconds in self._busy.items()},
            last_worker=self._last_worker,
        )

    def commit(self) -> Commit:
        """Make what ``update`` wrote the current version and open the next step."""
        assert self._commit is not None, "commit before update"
        self.version += 1
        commit, self._commit = self._commit, None
        self._open_step()
        return commit

    # -- reading -----------------------------------------------------------------------------------------------------

    def values(self, version: int) -> list[Tensor]:
        """The slices at ``version``, in the partition's order; live memory, overwritten by the update after next.

        Raises:
            VersionGone: if the version is not the committed one or a held one.
        """
        self._check_readable(version)
        return [self._values[piece.index][version % 2] for piece in self._slices]

    def flat(self, version: int) -> Tensor:
        """All slices at ``version`` as one vector; see ``values``."""
        self._check_readable(version)
        return self._flat[version % 2]

    def integers(self, version: int) -> dict[str, Tensor]:
        """Integer and boolean buffers at ``version``."""
        self._check_readable(version)
        return dict(self._integers[version % 2])

    def hold(self, version: int) -> None:
        """Keep ``version`` until ``release``: the update that would overwrite it waits."""
        self._check_readable(version)
        self._holds[version] += 1

    def release(self, version: int) -> None:
        """Give a held version free."""
        self._holds[version] -= 1

    def snapshot(self, version: int) -> ServerSnapshot:
        """Copies of everything at ``version``."""
        self._check_readable(version)
        return ServerSnapshot(
            version=version,
            slices={piece.index: self._slice_snapshot(piece.index, version) for piece in self._slices},
            integers={name: value.clone() for name, value in self._integers[version % 2].items()},
            constants=self._constants,
        )

    def _slice_snapshot(self, index: int, version: int) -> SliceSnapshot:
        optimizer = self._optimizers.get(index)
        state = optimizer.state(version) if optimizer else {}
        return SliceSnapshot(
            self._values[index][version % 2].clone(), {name: value.clone() for name, value in state.items()}
        )

    def _check_readable(self, version: int) -> None:
        if version != self.version and not self._holds[version]:
            raise VersionGone(f"server {self.index} has version {self.version}, not {version}")


def _squared_norm(values: Tensor) -> float:
    wide = values.double()
    return float(torch.dot(wide, wide))
