"""A worker's sums over its microbatches, made while backward runs: each gradient is added once, while it is in cache.

A run of microbatches is added along the canonical tree with a vector for each level that is open at a time (a binary
counter, about ``log2`` of the run's length). A leaf that completes a node is added straight to its left sibling, so a
run of one or two microbatches needs a single vector: the one that is pushed.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from paramserver.errors import ConfigError
from paramserver.reduction import Node, children, maximal_nodes
from workers.replica import Replica

__all__ = ["Deposit", "GradientSums", "plan_deposits"]


class Deposit(NamedTuple):
    """What happens with the gradients of one microbatch."""

    vector: int
    """Where they go."""
    add: bool
    """Whether they are added to what is there, or replace it."""
    merges: tuple[tuple[int, int], ...]
    """Afterwards: (target, source), the target's vector becomes target + source."""
    completes: Node | None
    """The maximal node that is whole with this microbatch."""


def plan_deposits(run: range, num_microbatches: int) -> tuple[list[Deposit], dict[Node, int]]:
    """For each microbatch of ``run`` its deposit, and the vector of each maximal node: they come first, in order."""
    nodes = maximal_nodes(run.start, run.stop, num_microbatches) if run else []
    deposits: list[Deposit] = []

    def walk(node: Node, vector: int, free: int) -> None:
        """Leave the sum over ``node`` in ``vector``; vectors from ``free`` on are unused."""
        if node.hi - node.lo == 1:
            deposits.append(Deposit(vector, False, (), None))
            return
        left, right = children(node)
        walk(left, vector, free)
        if right.hi - right.lo == 1:
            deposits.append(Deposit(vector, True, (), None))
            return
        walk(right, free, free + 1)
        last = deposits[-1]
        deposits[-1] = last._replace(merges=(*last.merges, (vector, free)))

    for index, node in enumerate(nodes):
        walk(node, index, len(nodes))
        deposits[-1] = deposits[-1]._replace(completes=node)
    return deposits, {node: index for index, node in enumerate(nodes)}


class GradientSums:
    """Hooks a replica's parameters for good; one object a replica.

    Args:
        replica: whose gradients are summed.
        run: its microbatches.
        num_microbatches: ``M``.
        allocate: makes a zeroed flat (length,) vector for a maximal node; those that are never sent are made here.
        on_key: called with the index of each parameter whose gradient has just come, while backward goes on.
        together: whether gradients are put away at ``settle``, all at once: on a GPU, where a kernel for each costs
            more than the work; not on a CPU, which has them in its caches at once alone. None: by the replica's device.
    """

    def __init__(
        self,
        replica: Replica,
        run: range,
        num_microbatches: int,
        allocate: Callable[[], Tensor],
        on_key: Callable[[int], None] = lambda _: None,
        *,
        together: bool | None = None,
    ) -> None:
        self._replica = replica
        self._run = run
        self._deposits, self.nodes = plan_deposits(run, num_microbatches)
        count = 1 + max((max(d.vector, *(s for _, s in d.merges), 0) for d in self._deposits), default=-1)
        # Zeros once: keys overwrite their places at every use, and the padding between them must stay zero.
        self.vectors = [allocate() if index < len(self.nodes) else self._private() for index in range(count)]
        self._views = [tuple(key.view(vector) for vector in self.vectors) for key, _ in replica.parameters]
        self._buffers = replica.new_buffer_part() if replica.has_buffers else None
        self._open: Deposit | None = None
        self._together = replica.device.type == "cuda" if together is None else together
        self._waiting: list[tuple[int, Tensor]] = []
        self._on_key = on_key
        self._counted = False
        self._done = [False] * len(replica.parameters)
        self._hooks: list[RemovableHandle] = []
        for index, (key, parameter) in enumerate(replica.parameters):
            take = self._hook(index, key.name)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(take))  # type: ignore[no-untyped-call]

    def _private(self) -> Tensor:
        return torch.zeros(self._replica.values.shape, device=self._replica.device)

    def _hook(self, index: int, name: str) -> Callable[[nn.Parameter], None]:
        def take(parameter: nn.Parameter) -> None:
            if self._open is None:  # somebody else's backward
                return
            if self._done[index]:
                raise ConfigError(
                    f"gradient of {name!r} came twice in one backward: reentrant checkpointing is not supported, "
                    "use use_reentrant=False"
                )
            self._done[index] = True
            if self._together and parameter.grad is not None:
                self._waiting.append((index, parameter.grad))
            else:
                self._put(self._open, self._views[index], parameter.grad)  # autograd has gradients off here
            parameter.grad = None
            self._on_key(index)

        return take

    @torch.no_grad()
    def settle(self) -> None:
        """See that all gradients that came are in their vectors, before those are read."""
        if not self._waiting:
            return
        assert self._open is not None
        waiting, self._waiting = self._waiting, []
        vectors = [[self._views[index][number] for index, _ in waiting] for number in range(len(self.vectors))]
        put = torch._foreach_add_ if self._open.add else torch._foreach_copy_
        put(vectors[self._open.vector], [gradient for _, gradient in waiting])
        for into, source in self._open.merges:
            torch._foreach_add_(vectors[into], vectors[source])

    def close(self) -> None:
        """Take the hooks out of the model again, and drop what an interrupted backward has left."""
        for hook in self._hooks:
            hook.remove()
        for _, parameter in self._replica.parameters:
            parameter.grad = None

    def begin(self, microbatch: int) -> Deposit:
        """The next backward is that of ``microbatch``; gives what will happen with its gradients."""
        self._open = self._deposits[microbatch - self._run.start]
        self._waiting.clear()
        self._done = [False] * len(self._done)
        self._counted = False
        return self._open

    @torch.no_grad()
    def put_buffers(self, samples: int) -> None:
        """After forward: the buffers are what they will be. ``end`` does it, if this was not called."""
        if self._buffers is None or self._counted:
            return
        assert self._open is not None
        self._counted = True
        if samples:
            self._replica.take_buffer_changes(self._buffers, samples)
        change = self._buffers if samples else None
        self._put(self._open, [self._replica.buffer_part(vector) for vector in self.vectors], change)

    @staticmethod
    def _put(deposit: Deposit, vectors: Sequence[Tensor], value: Tensor | None) -> None:
        target = vectors[deposit.vector]
        if value is None:
            target.add_(0.0) if deposit.add else target.zero_()  # adding zero is not nothing: -0.0 becomes 0.0
        elif deposit.add:
            target.add_(value)
        else:
            target.copy_(value)
        for into, source in deposit.merges:
            vectors[into].add_(vectors[source])

    def end(self, microbatch: int, samples: int) -> None:
        """After the backward of ``microbatch``, if it has samples: buffers, and keys without a gradient."""
        if not samples:
            self.begin(microbatch)
        self.settle()
        if not all(self._done):
            self._put_zeros()
        if not self._counted:
            self.put_buffers(samples)
        self._open = None

    @torch.no_grad()
    def _put_zeros(self) -> None:
        assert self._open is not None
        for index in [index for index, done in enumerate(self._done) if not done]:
            self._put(self._open, self._views[index], None)
            self._on_key(index)
