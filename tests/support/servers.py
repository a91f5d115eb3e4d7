"""Servers in this process, and the pushes that workers would send them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from paramserver.client import Client
from paramserver.config import OptimizerConfig, ServerConfig
from paramserver.messages import Commit, MicrobatchStats, Push
from paramserver.partition import BUFFERS, KeySpec, Partition, make_partition
from paramserver.reduction import Node
from paramserver.server import Server
from paramserver.state import State, assemble
from paramserver.transport.in_process import InProcessServers, InProcessTransport

torch.set_num_threads(1)

TIMEOUT_S = 20.0
"""Far more than any wait of a correct program takes: no test waits for it."""


def specs_of(
    values: Mapping[str, Tensor], buffers: Sequence[str] = (), optimizer: OptimizerConfig | None = None
) -> list:
    """Keys as a model would describe them: a group for each learning rate factor, and one for buffers."""
    optimizer = optimizer or OptimizerConfig()
    factors = sorted({optimizer.lr_factor(name) for name in values if name not in buffers})
    return [
        KeySpec(
            name,
            tuple(value.shape),
            tuple(value.stride()),
            BUFFERS if name in buffers else factors.index(optimizer.lr_factor(name)),
        )
        for name, value in values.items()
    ]


def rows_of(node: Node, *, weight: float = 1.0, samples: int = 1, loss: float = 0.0) -> tuple[MicrobatchStats, ...]:
    """One row a microbatch, all alike."""
    return tuple(MicrobatchStats(index, loss, weight, samples) for index in range(node.lo, node.hi))


class Fleet:
    """All servers of a run, in this process; slices of 64 elements unless another size is asked for."""

    def __init__(
        self,
        values: Mapping[str, Tensor],
        optimizer: OptimizerConfig | None = None,
        *,
        num_microbatches: int = 1,
        num_servers: int = 1,
        slice_bytes: int = 256,
        buffers: Sequence[str] = (),
        integers: Mapping[str, Tensor] | None = None,
        state: State | None = None,
    ) -> None:
        self.optimizer = optimizer or OptimizerConfig(lr=1.0)
        self.num_microbatches = num_microbatches
        config = ServerConfig(num_servers=num_servers, slice_bytes=slice_bytes)
        self.partition: Partition = make_partition(specs_of(values, buffers, self.optimizer), config)
        self.initial = state or State(version=0, values=values, integers=integers or {})
        self.servers = [
            Server(index, self.partition, self.optimizer, num_microbatches, self.initial)
            for index in range(num_servers)
        ]
        self.group = InProcessServers(self.servers)

    @property
    def root(self) -> Node:
        """The whole minibatch."""
        return Node(0, self.num_microbatches)

    def client(self, worker: int = 0, timeout_s: float = TIMEOUT_S) -> Client:
        """A worker's client."""
        return Client(worker, self.partition, InProcessTransport(self.group), timeout_s)

    def state(self, version: int | None = None) -> State:
        """A copy of everything, at the committed version unless another one is asked for."""
        return assemble(
            self.partition,
            [server.snapshot(server.version if version is None else version) for server in self.servers],
        )

    def flatten(self, values: Mapping[str, Tensor]) -> Tensor:
        """Values of some keys as a flat vector, zeros elsewhere."""
        zeros = {key.name: torch.zeros(key.shape) for key in self.partition.keys}
        return self.partition.flatten({**zeros, **values})

    def push(self, step: int, node: Node, values: Mapping[str, Tensor], server: int = 0, **changes: object) -> Push:
        """A push for one server's slices; ``changes`` replaces fields of it."""
        flat = self.flatten(values)
        fields: dict = {
            "run": "run",
            "step": step,
            "generation": 0,
            "worker": 0,
            "node": node,
            "slices": {piece.index: flat[piece.start : piece.stop] for piece in self.partition.by_server[server]},
            "stats": rows_of(node),
        }
        return Push(**{**fields, **changes})

    def step(
        self,
        gradients: Mapping[str, Tensor],
        *,
        stats: tuple[MicrobatchStats, ...] | None = None,
        integers: Mapping[str, Tensor] | None = None,
    ) -> Commit:
        """One whole step, pushed by one worker as the root of the tree."""
        client, step = self.client(), self.servers[0].version
        client.push(step, self.root, self.flatten(gradients), stats or rows_of(self.root), integers or {})
        return client.wait(step + 1)


def bits_equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether two sets of fp32 tensors are the same to the bit, signs of zeros and NaNs included."""
    return left.keys() == right.keys() and all(
        torch.equal(left[name].contiguous().view(torch.int32), right[name].contiguous().view(torch.int32))
        for name in left
    )
