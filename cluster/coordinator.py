"""Who is alive and who computes which microbatches: starts the actors, collects their reports, stops them.

It is not on the path of a step: workers run freely and the servers' commit is their barrier.
"""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.actors import Place, ServerActor, WorkerActor
from cluster.config import ClusterConfig
from cluster.placement import check_room, resources
from cluster.relay import RelayActor
from cluster.rounding import Roundings
from models.errors import TaskError
from models.registry import TaskSource
from paramserver.errors import PushPullError, ReplicaMismatch, ServerLost, StepTimeout, WorkerLost
from paramserver.partition import Partition
from paramserver.reduction import maximal_nodes
from paramserver.state import State, assemble
from paramserver.transport.channel import Address
from workers.minibatch import deal_runs
from workers.report import EvaluationReport, StepReport, merge_evaluations, merge_steps

__all__ = ["Coordinator"]

_POLL_S = 1.0


class Coordinator:
    """One parameter-server run on a Ray cluster that was started already; use it as a context manager.

    Args:
        source: the task.
        config: settings of all actors.
        partition: of the task's model.
        state: what the run starts from.
    """

    def __init__(self, source: TaskSource, config: ClusterConfig, partition: Partition, state: State) -> None:
        self._config = config
        self._partition = partition
        self._first_version = state.version
        self._roundings = Roundings(config, partition, state.residuals)
        state = replace(state, residuals={})  # servers have no use for them
        check_room(config)
        self._servers = [
            self._start_server(index, partition, ray.put(state)) for index in range(config.servers.num_servers)
        ]
        self._workers = [self._start_worker(index, source) for index in range(config.worker.num_workers)]
        self._relays: list[Any] = []
        self.places: dict[str, list[Place]] = {}
        self.notices: list[str] = []
        """What the user should know of how the run is spread, once it is started."""

    def _start_server(self, index: int, partition: Partition, state: Any) -> Any:
        config = self._config
        actor = ray.remote(ServerActor).options(num_cpus=1, num_gpus=0, max_restarts=0, max_task_retries=0)
        return actor.remote(
            index,
            partition,
            config.optimizer,
            config.worker.plan.microbatches,
            state,
            config.run,
            config.server_threads,
            config.held_versions,
            config.arena_dir,
        )

    def _start_worker(self, index: int, source: TaskSource) -> Any:
        config, worker = self._config, replace(self._config.worker, worker=index)
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
        return actor.remote(source, config.options, worker, config.optimizer, config.servers, config.arena_dir)

    def __enter__(self) -> "Coordinator":
        return self

    def __exit__(self, *_: object) -> None:
        for actor in (*self._workers, *self._relays, *self._servers):
            ray.kill(actor)

    def start(self) -> None:
        """Wait until every actor has its place and its model, and see that all devices are of one kind.

        Raises:
            WorkerLost, ServerLost: if an actor died or raised.
            StepTimeout: if an actor found no place in time.
            ReplicaMismatch: if devices differ in what changes bits.
        """
        deadline = time.monotonic() + self._config.start_timeout_s
        servers = [actor.place.remote() for actor in self._servers]
        workers = [actor.place.remote() for actor in self._workers]
        self.places["server"] = [self._started("server", i, ref, deadline) for i, ref in enumerate(servers)]
        self.places["worker"] = [self._started("worker", i, ref, deadline) for i, ref in enumerate(workers)]
        self._number_by_node()
        self._open_servers(deadline)
        if self._config.transport != "ray":
            self._open_relays(deadline)
        self._round_pushes()
        kinds = [place.device_kind or {} for place in self.places["worker"]]
        for index, kind in enumerate(kinds):
            for name, value in kind.items():
                if value != kinds[0].get(name):
                    raise ReplicaMismatch(
                        f"worker {index} has {name} {value!r}, worker 0 has {kinds[0].get(name)!r}: "
                        "all devices of a run must be of one kind, or their bits differ"
                    )

    def _number_by_node(self) -> None:
        """Number workers node by node: then a node's microbatches are one run, and few tree nodes go over the wire."""
        places = self.places["worker"]
        nodes = list(dict.fromkeys(place.node for place in places))
        order = sorted(range(len(places)), key=lambda index: nodes.index(places[index].node))
        self._workers = [self._workers[index] for index in order]
        self.places["worker"] = [places[index] for index in order]

    def _open_servers(self, deadline: float) -> None:
        """Let servers begin to serve; those of one node share the arena of its first."""
        self._addresses: dict[str, dict[int, Address]] = {}
        for index, (actor, place) in enumerate(zip(self._servers, self.places["server"], strict=True)):
            here = self._addresses.setdefault(place.node, {})
            opened = actor.open.remote(self._servers, next(iter(here.values()), None))
            here[index] = self._started("server", index, opened, deadline)

    def _open_relays(self, deadline: float) -> None:
        """On each node with workers, something that stands for the servers elsewhere."""
        plan, places = self._config.worker.plan, self.places["worker"]
        runs = deal_runs(plan.microbatches, len(places))
        self.places["relay"] = []
        for node in dict.fromkeys(place.node for place in places):
            here = self._addresses.setdefault(node, {})
            far = [server for server in range(len(self._servers)) if server not in here]
            if not far:
                continue
            inside = [run for place, run in zip(places, runs, strict=True) if place.node == node]
            run = range(inside[0].start, inside[-1].stop)
            self._note_tree_nodes(node, run)
            relay = self._start_relay(node, run)
            self._relays.append(relay)
            rounding = self._roundings.deal(run, far)
            opened = relay.open.remote(self._servers, far, next(iter(here.values()), None), rounding)
            self.places["relay"].append(self._started("relay", len(self._relays) - 1, relay.place.remote(), deadline))
            here.update(self._started("relay", len(self._relays) - 1, opened, deadline))

    def _note_tree_nodes(self, node: str, run: range) -> None:
        M = self._config.worker.plan.microbatches
        count = len(maximal_nodes(run.start, run.stop, M))
        if count > 1:
            host = next(place.host for place in self.places["worker"] if place.node == node)
            self.notices.append(
                f"{host} (node {node[:8]}) sends {count} tree nodes of the parameters' size a step, for microbatches "
                f"[{run.start}, {run.stop}) of {M}: it is 1 where M / nodes is a power of two and all nodes have as "
                "many workers"
            )

    def _round_pushes(self) -> None:
        """Workers round what they push through Ray; in shared memory there is no wire."""
        runs = deal_runs(self._config.worker.plan.microbatches, len(self._workers))
        servers = range(len(self._servers))
        through_ray = self._config.transport == "ray"
        self._worker_roundings = [self._roundings.deal(run, servers) if through_ray else None for run in runs]
        if dropped := self._roundings.dropped:
            named = ", ".join(f"[{node.lo}, {node.hi})" for node in dropped)
            self.notices.append(
                f"residuals of sums over {named} are dropped: in this run nobody sends these sums through Ray"
            )

    def _start_relay(self, node: str, run: range) -> Any:
        config, pinned = self._config, NodeAffinitySchedulingStrategy(node, soft=False)
        actor = ray.remote(RelayActor).options(num_cpus=0, num_gpus=0, max_restarts=0, scheduling_strategy=pinned)
        timeout_s = config.worker.step_timeout_s
        return actor.remote(
            self._partition,
            config.worker.plan.microbatches,
            run,
            config.server_threads,
            config.arena_dir,
            timeout_s,
        )

    def _started(self, role: str, index: int, reference: Any, deadline: float) -> Any:
        try:
            return ray.get(reference, timeout=max(0.0, deadline - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            raise StepTimeout(
                f"{role} {index} was not started within {self._config.start_timeout_s:.0f} s: "
                f"the cluster has {resources(ray.clusterresources())}, free are {resources(ray.availableresources())}"
            ) from None
        except ray.exceptions.RayError as error:
            raise self._lost(role, index, error) from None

    def _lost(self, role: str, index: int, error: ray.exceptions.RayError) -> BaseException:
        """What an actor raised, or that it is gone."""
        if isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None:
            if not isinstance(error.cause, PushPullError | TaskError):
                # An error in somebody's task: say where, without Ray's colours.
                error.cause.add_note(re.sub(r"\x1b\[\d+m", "", str(error)))
            return error.cause  # type: ignore[no-any-return]
        init = getattr(error, "cause", None) or getattr(error, "__cause__", None)
        if isinstance(init, ray.exceptions.RayTaskError) and init.cause is not None:
            return init.cause  # type: ignore[no-any-return]
        places = self.places.get(role)
        where = f" (pid {places[index].pid} on {places[index].host})" if places else ""
        kind, named = (WorkerLost, {"worker": index}) if role == "worker" else (ServerLost, {"server": index})
        return kind(f"{role} {index}{where} died: look at its log, or resume with --resume", **named)

    def run(self, stop_requested: Callable[[], bool]) -> Iterator[StepReport | EvaluationReport]:
        """Let the workers train; gives each step once all have reported it, and each evaluation, in order of steps.

        Args:
            stop_requested: asked often; once it says so, the run ends with the version that is committed next.

        Raises:
            WorkerLost, ServerLost, StepTimeout: naming who.
            Exception: what a worker raised, such as ``DataError``.
        """
        streams = [
            actor.run.options(num_returns="streaming").remote(
                index, self._servers, self._addresses[place.node] if self._config.transport != "ray" else {}, rounding
            )
            for index, (actor, place, rounding) in enumerate(
                zip(self._workers, self.places["worker"], self._worker_roundings, strict=True)
            )
        ]
        indices = {stream: index for index, stream in enumerate(streams)}
        merged = _Merger(len(streams))
        quiet_since = time.monotonic()
        stopping = False
        while indices:
            if not stopping and stop_requested():
                stopping = True
                self._servers[0].request_stop.remote()
            ready, _ = ray.wait(list(indices), num_returns=1, timeout=_POLL_S, fetch_local=False)
            if not ready:
                self._check_quiet(quiet_since, sorted(indices.values()))
                continue
            quiet_since = time.monotonic()
            index = indices[ready[0]]
            try:
                report = ray.get(next(ready[0]))
            except StopIteration:
                del indices[ready[0]]
                continue
            except ray.exceptions.RayError as error:
                raise self._lost("worker", index, error) from None
            for whole in merged.add(report):
                if isinstance(whole, StepReport):
                    self._roundings.keep(whole)
                yield whole

    def _check_quiet(self, since: float, indices: list[int]) -> None:
        limit = 2.0 * self._config.worker.step_timeout_s
        if time.monotonic() - since > limit:
            raise StepTimeout(f"no word from workers {indices} for {limit:.0f} s (twice --step-timeout)")

    def state(self, version: int, *, release: bool = False) -> State:
        """A copy of everything at ``version``: the last one, or one that is held (and is given free)."""
        references = [actor.snapshot.remote(version, release=release) for actor in self._servers]
        relays = self._relays if self._roundings.active else []
        asked = [relay.residuals.remote(version, release=release) for relay in relays]
        timeout_s = self._config.worker.step_timeout_s
        try:
            state = assemble(self._partition, ray.get(references, timeout=timeout_s))
            residuals = self._roundings.collect(version, ray.get(asked, timeout=timeout_s))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        return replace(state, residuals=residuals)


class _Merger:
    """Puts the workers' reports of a step together once all have come."""

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._steps: dict[int, list[StepReport]] = {}
        self._evaluations: dict[int, list[EvaluationReport]] = {}

    def add(self, report: StepReport | EvaluationReport) -> Iterator[StepReport | EvaluationReport]:
        """Take a report in, give the whole step or evaluation that it completes."""
        if isinstance(report, StepReport):
            steps = self._steps.setdefault(report.step, [])
            steps.append(report)
            if len(steps) == self._num_workers:
                yield merge_steps(self._steps.pop(report.step))
        else:
            parts = self._evaluations.setdefault(report.step, [])
            parts.append(report)
            if len(parts) == self._num_workers:
                yield merge_evaluations(self._evaluations.pop(report.step))
