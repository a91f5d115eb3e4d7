"""How each kind of actor is asked for: its place, its share of the cluster, its environment."""

from dataclasses import replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config import ClusterConfig
from cluster.relay import RelayActor
from cluster.replica import ReplicaActor
from cluster.server_actor import ServerActor
from cluster.worker_actor import WorkerActor
from models.registry import TaskSource
from paramserver.partition import Partition
from paramserver.state import State

__all__ = ["Starter"]


class Starter:
    """Asks Ray for the actors of one run. They are never restarted by Ray, nor are their calls repeated by it.

    Args:
        source: the task.
        config: settings of all actors.
        partition: of the task's model.
        frame: the run's state without its values: what a server needs that goes on from memory.
    """

    def __init__(self, source: TaskSource, config: ClusterConfig, partition: Partition, frame: State) -> None:
        self._source = source
        self._config = config
        self._partition = partition
        self._frame = ray.put(frame)

    def server(self, state: Any = None, node: str | None = None) -> Any:
        """A server that is not open yet.

        Args:
            state: reference of what it starts from; None for one that goes on from memory.
            node: where it must run; it then takes no share of the node's processors, being in somebody's place.
        """
        config = self._config
        options: dict[str, Any] = {"num_cpus": 1} if node is None else {"num_cpus": 0, **_pinned(node)}
        actor = ray.remote(ServerActor).options(num_gpus=0, max_restarts=0, max_task_retries=0, **options)
        return actor.remote(
            self._partition,
            config.optimizer,
            config.worker.plan.microbatches,
            self._frame if state is None else state,
            config.run,
            config.server_threads,
            config.arena_dir,
            config.faults,
            config.verify_every,
        )

    def worker(self, number: int) -> Any:
        """A worker."""
        config, worker = self._config, replace(self._config.worker, worker=number, num_workers=1)
        gpus = 1 if worker.device == "cuda" and not config.share_device else 0
        actor = ray.remote(WorkerActor).options(
            num_cpus=1,
            num_gpus=gpus,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={
                "env_vars": {
                    # What libraries under torch read; torch's own number is set by the worker.
                    "OMP_NUM_THREADS": str(worker.threads),
                    "OMP_WAIT_POLICY": "passive",
                    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
                }
            },
        )
        about = (config.options, worker, config.optimizer, config.servers, config.arena_dir, config.faults)
        return actor.remote(self._source, *about)

    def replica(self, node: str) -> Any:
        """What keeps committed versions of servers of other nodes."""
        return ray.remote(ReplicaActor).options(num_cpus=0, num_gpus=0, max_restarts=0, **_pinned(node)).remote()

    def relay(self, node: str) -> Any:
        """What stands on a node for servers elsewhere."""
        config = self._config
        actor = ray.remote(RelayActor).options(num_cpus=0, num_gpus=0, max_restarts=0, **_pinned(node))
        return actor.remote(
            self._partition,
            config.worker.plan.microbatches,
            config.server_threads,
            config.arena_dir,
            config.worker.step_timeout_s,
        )


def _pinned(node: str) -> dict[str, Any]:
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}
