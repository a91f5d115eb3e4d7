"""Measures one round of synchronisation, push to pull, beside DDP, Ray's example and what memory allows."""

import socket
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch

from cluster.round_actors import ExampleServer, RoundConfig, RoundWorker, build_round_model
from cluster.server_actor import ServerActor
from paramserver.state import State
from workers.replica import describe_model
from workers.rounds import limit_round, timed

__all__ = ["RoundTimes", "measure_rounds"]

_BLOCKS = 5
_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class RoundTimes:
    """Milliseconds of each measured round, without the backward that fills the gradients."""

    ours: list[float]
    """From the push of gradients that lie in the workers' arenas until every parameter is pulled."""
    ddp: list[float]
    ray_example: list[float]
    limit: list[float]
    backward: list[float]
    """Handing the gradients out: its median is taken off the others."""
    fill: list[float]
    """The same, which leaves them in the worker's arena; ``ours`` begins after it."""
    parameter_bytes: int
    arena_bytes: int
    """Shared memory of the node."""
    server_ms: Mapping[str, float]
    """Where the servers were busy in the last round, by stage."""


def measure_rounds(config: RoundConfig) -> RoundTimes:
    """Run all contestants in blocks, one after the other, again and again; Ray must have been started."""
    model = build_round_model(config)
    partition, state = describe_model(model, config.optimizer, config.servers)
    servers = _start_servers(config, partition, state)
    worker_actor = ray.remote(RoundWorker).options(num_cpus=1, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})
    workers = [worker_actor.remote(config, index) for index in range(config.workers)]
    example = ray.remote(ExampleServer).options(num_cpus=1).remote(config)
    actors = [*servers, *workers, example]
    try:
        _get([actor.place.remote() for actor in (*servers, *workers)])
        addresses: dict[int, Any] = {}
        for index, server in enumerate(servers):
            addresses[index] = _get([server.open.remote(index, addresses.get(0))])[0]
        _get([server.regroup.remote(0, servers, (), {}) for server in servers])
        near = {} if config.transport == "ray" else addresses
        port = _free_port()
        arenas = sum(_get([worker.connect.remote(servers, near, port) for worker in workers]))
        torch.set_num_threads(1)  # the limit is measured in this process
        limit = limit_round(partition.length, config.workers, config.optimizer)
        weights = example.weights.remote()
        found: dict[str, list[float]] = {
            name: [] for name in ("ours", "ddp", "ray_example", "limit", "backward", "fill")
        }
        rounds = max(1, -(-config.rounds // _BLOCKS))
        for _ in range(min(_BLOCKS, config.rounds)):
            found["backward"] += _all(workers, "plain", rounds)
            found["fill"] += _all(workers, "fill", rounds)
            found["ours"] += _all(workers, "ours", rounds)
            found["ddp"] += _all(workers, "ddp", rounds)
            times, weights = _example_rounds(example, workers, weights, rounds)
            found["ray_example"] += times
            found["limit"] += timed(limit, rounds)
        commit = _get([servers[0].status.remote()])[0].last
        held = _get([server.arena_bytes.remote() for server in servers])
        versions = held[0][0] + sum(own for _, own in held)
        _get([worker.close.remote() for worker in workers])
    finally:
        for actor in actors:
            ray.kill(actor)
    backward = statistics.median(found["backward"])
    off = {"ddp": backward, "ray_example": backward}
    return RoundTimes(
        **{name: [value - off.get(name, 0.0) for value in values] for name, values in found.items()},
        parameter_bytes=4 * sum(p.numel() for p in model.parameters()),
        arena_bytes=arenas + versions,
        server_ms=commit.server_ms,
    )


def _start_servers(config: RoundConfig, partition: Any, state: State) -> list[Any]:
    actor = ray.remote(ServerActor).options(num_cpus=1, max_restarts=0, max_task_retries=0)
    return [
        actor.remote(
            partition,
            config.optimizer,
            config.workers,
            state,
            "rounds",
            config.server_threads,
            config.arena_dir,
        )
        for _ in range(config.servers.num_servers)
    ]


def _get(references: Sequence[Any]) -> list[Any]:
    found: list[Any] = ray.get(list(references), timeout=_TIMEOUT_S)
    return found


def _all(workers: Sequence[Any], contestant: str, rounds: int) -> list[float]:
    """Each round's time, the mean over workers: they go in step."""
    times = _get([getattr(worker, contestant).remote(rounds) for worker in workers])
    return [statistics.fmean(of_round) for of_round in zip(*times, strict=True)]


def _example_rounds(example: Any, workers: Sequence[Any], weights: Any, rounds: int) -> tuple[list[float], Any]:
    def one() -> None:
        nonlocal weights
        weights = example.apply_gradients.remote(*[worker.example_gradients.remote(weights) for worker in workers])
        ready, _ = ray.wait([weights], timeout=_TIMEOUT_S, fetch_local=False)
        assert ready, "Ray's example did not answer"

    return timed(one, rounds), weights


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
