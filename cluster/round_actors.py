"""Actors of the benchmark of the round: each worker takes part in all that are compared, in turn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.place import Place, place_of_process, prepare_process
from cluster.route import route
from models.options import TaskOptions
from models.registry import TaskSource, build_task
from paramserver.client import Client
from paramserver.config import OptimizerConfig, ServerConfig
from paramserver.transport.channel import Address
from workers.ddp import wrap_plainly
from workers.device import tune_cpu_process
from workers.param_server import ParamServerBackend
from workers.process_group import join_gloo, leave, meet
from workers.replica import Replica, describe_model
from workers.rounds import BlockModel, Filling, backend_round, ddp_round, fill_round, plain_round, timed
from workers.seeding import seeded

__all__ = ["ExampleServer", "RoundConfig", "RoundWorker", "build_round_model"]

_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class RoundConfig:
    """What is synchronised, and by how many."""

    source: TaskSource | None
    """The task whose model's parameters are taken, or None."""
    options: TaskOptions | None
    """Of that task."""
    megabytes: float
    """Size of the parameters where there is no task."""
    workers: int
    optimizer: OptimizerConfig
    servers: ServerConfig
    server_threads: int
    rounds: int
    transport: str = "auto"
    arena_dir: str = "/dev/shm"


def build_round_model(config: RoundConfig) -> torch.nn.Module:
    """The model whose parameters are synchronised; the same in every process."""
    with seeded("model", 0):
        if config.source is None or config.options is None:
            return BlockModel(config.megabytes)
        return build_task(config.source, config.options).build_model()


class RoundWorker:
    """One worker of every contestant."""

    def __init__(self, config: RoundConfig, index: int) -> None:
        prepare_process()
        torch.set_num_threads(1)
        tune_cpu_process()
        self._config = config
        self._index = index
        model = build_round_model(config)
        partition, _ = describe_model(model, config.optimizer, config.servers)
        self._ours = Filling(model, seed=index)
        self._replica = Replica(model, partition)
        self._other = Filling(build_round_model(config), seed=index)
        self._plain = plain_round(self._other)

    def place(self) -> Place:
        """Where this worker runs."""
        return place_of_process()

    def connect(self, servers: Sequence[Any], addresses: Mapping[int, Address], port: int) -> int:
        """Meet the servers and the other ranks; gives the bytes of shared memory that this worker made."""
        config = self._config
        self._transport = route(servers, addresses, self._replica.partition, Path(config.arena_dir))
        client = Client(self._index, self._replica.partition, self._transport, _TIMEOUT_S)
        run = range(self._index, self._index + 1)
        backend = ParamServerBackend(self._replica, client, run, config.workers)
        self._fill = fill_round(self._ours, backend, self._index)
        self._backend_round = backend_round(self._ours, backend, self._index, meet)
        join_gloo(self._index, config.workers, port, _TIMEOUT_S)
        self._ddp_round = ddp_round(self._other, wrap_plainly(self._other), config.optimizer)
        return getattr(self._transport, "arena_bytes", 0)

    def plain(self, rounds: int) -> list[float]:
        """Milliseconds of backward alone."""
        return timed(self._plain, rounds)

    def fill(self, rounds: int) -> list[float]:
        """Milliseconds of backward that leaves the gradients in this worker's arena."""
        return timed(self._fill, rounds)

    def ours(self, rounds: int) -> list[float]:
        """Milliseconds of push, sum, update and pull."""
        return timed(self._backend_round, rounds)

    def ddp(self, rounds: int) -> list[float]:
        """Milliseconds of backward with all-reduce, and the optimizer's step."""
        return timed(self._ddp_round, rounds)

    def example_gradients(self, weights: Mapping[str, Any]) -> list[Any]:
        """As Ray's documented example: take the weights, give the gradients as NumPy arrays."""
        self._other.model.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in weights.items()})
        self._other().backward()
        gradients = [p.grad.numpy() for p in self._other.parameters() if p.grad is not None]
        self._other.zero_grad()
        return gradients

    def close(self) -> None:
        """Leave everything."""
        self._transport.close()
        leave()


class ExampleServer:
    """The parameter server of Ray's documented example (docs.ray.io, "Parameter Server"), with momentum."""

    def __init__(self, config: RoundConfig) -> None:
        prepare_process()
        torch.set_num_threads(config.server_threads)
        self._model = build_round_model(config)
        optimizer = config.optimizer
        self._optimizer = torch.optim.SGD(
            self._model.parameters(), lr=optimizer.lr, momentum=optimizer.momentum, weight_decay=optimizer.weight_decay
        )

    def weights(self) -> dict[str, Any]:
        """All parameters and buffers."""
        return {name: value.numpy() for name, value in self._model.state_dict().items()}

    def apply_gradients(self, *gradients: Sequence[Any]) -> dict[str, Any]:
        """Add the workers' gradients, take a step, give the weights."""
        summed = [np.stack(parts).sum(axis=0) for parts in zip(*gradients, strict=True)]
        self._optimizer.zero_grad()
        for parameter, gradient in zip(self._model.parameters(), summed, strict=True):
            parameter.grad = torch.from_numpy(gradient)
        self._optimizer.step()
        return self.weights()
