"""The first test of the project: with the same M and seed, any number of workers gives the bits of one (E2 to E6)."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from paramserver.client import Client
from paramserver.config import OptimizerConfig, ServerConfig
from paramserver.errors import ReplicaMismatch
from paramserver.integers import IntegerBlock
from paramserver.partition import Slice
from tests.support.tiny_task import TinyTask
from tests.support.training import Run, train_single, train_workers
from workers.config import PlanConfig, WorkerConfig
from workers.host_memory import HostMemory
from workers.replica import Replica
from workers.seeding import seeded
from workers.timing import PHASES

# 31 samples in minibatches of 15: unequal microbatches, and one of a single sample with three empty ones.
PLAN = PlanConfig(batch_size=15, microbatches=4, steps=5, seed=3)
CONFIG = WorkerConfig(plan=PLAN, eval_batch_size=4, step_timeout_s=30.0)
SLICES = ServerConfig(slice_bytes=512)
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "schedule": "cosine", "total_steps": 5},
    "adam": {"name": "adam", "lr": 0.01, "lr_factors": (("head.*", 3.0),)},
    "clipped": {"lr": 0.5, "clip_grad_norm": 0.5},
    "frozen": {"lr": 0.1, "momentum": 0.9, "frozen": ("stem.*",)},
}


@cache
def _single(optimizer: str, *, channels_last: bool = False) -> Run:
    config = replace(CONFIG, channels_last=channels_last)
    return train_single(TinyTask(), config, OptimizerConfig(**OPTIMIZERS[optimizer]), SLICES)


def _workers(optimizer: str, num_workers: int, num_servers: int, *, channels_last: bool = False) -> Run:
    config = replace(CONFIG, num_workers=num_workers, channels_last=channels_last)
    servers = replace(SLICES, num_servers=num_servers)
    return train_workers(TinyTask(), config, OptimizerConfig(**OPTIMIZERS[optimizer]), servers)


def _assert_equal(run: Run, other: Run) -> None:
    assert run.fingerprint == other.fingerprint
    assert run.optimizer_fingerprint == other.optimizer_fingerprint
    assert run.samples == other.samples
    assert [step.loss for step in run.steps] == [step.loss for step in other.steps]
    assert [step.commit.stats for step in run.steps] == [step.commit.stats for step in other.steps]
    assert [e.metric.compute() for e in run.evaluations] == [e.metric.compute() for e in other.evaluations]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("num_workers", "num_servers"), [(1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (3, 2), (4, 3)])
def test_any_number_of_workers_and_servers_equals_single(optimizer: str, num_workers: int, num_servers: int) -> None:
    _assert_equal(_workers(optimizer, num_workers, num_servers), _single(optimizer))


@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_same_holds_in_channels_last_order(num_workers: int) -> None:
    run = _workers("sgd", num_workers, 2, channels_last=True)
    _assert_equal(run, _single("sgd", channels_last=True))
    assert run.state.values["body.weight"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_threads_of_a_server_change_no_bit(optimizer: str) -> None:
    config, settings = replace(CONFIG, num_workers=2), OptimizerConfig(**OPTIMIZERS[optimizer])
    servers = replace(SLICES, num_servers=2)
    _assert_equal(train_workers(TinyTask(), config, settings, servers, update_threads=3), _single(optimizer))


_coming: dict[Replica, list[tuple[IntegerBlock, torch.Tensor]]] = {}
"""Integer buffers on their way to the host, and what they will be."""


def _late_integers(replica: Replica, *, later: bool = False) -> IntegerBlock:
    assert later
    block = IntegerBlock(replica._integers.layout, torch.full_like(replica._integers.data, 255))
    _coming.setdefault(replica, []).append((block, replica._integers.data.clone()))
    return block


class _LateMemory(HostMemory):
    """A GPU's on a CPU: sums come to where servers read them only when somebody waits for that."""

    copies = True

    def __init__(self, replica: Replica, client: Client, *, queues: bool = False) -> None:
        super().__init__(replica, client)
        self.queues = queues
        self._expected: Sequence[Sequence[Slice]] = ()
        self._twins: dict[int, torch.Tensor] = {}

    def new_sum(self) -> torch.Tensor:
        vector = torch.zeros_like(self._replica.values)
        self._twins[vector.data_ptr()] = self._client.allocate()
        return vector

    def on_host(self, vector: torch.Tensor) -> torch.Tensor:
        return self._twins[vector.data_ptr()]

    def computed(self) -> Callable[[], None]:
        coming = list(_coming.get(self._replica, ()))

        def wait() -> None:
            for block, content in coming:
                block.data.copy_(content)

        return wait

    def send(self, vector: torch.Tensor, slices: Sequence[Slice]) -> Callable[[], None]:
        def arrive() -> None:
            for piece in slices:
                self.on_host(vector)[piece.start : piece.stop] = vector[piece.start : piece.stop]

        return arrive

    def expect(self, version: int, groups: Sequence[Sequence[Slice]]) -> None:
        self._expected = groups

    def show(self, version: int) -> None:
        for slices in self._expected:
            self._client.await_slices(version, slices)
        super().show(version)


@pytest.mark.parametrize("early_forward", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("num_workers", "M"), [(1, 4), (2, 4), (3, 4), (2, 6)])
def test_sums_that_reach_the_host_late_change_no_bit(
    monkeypatch: pytest.MonkeyPatch, num_workers: int, M: int, overlap: bool, early_forward: bool
) -> None:
    """Of six microbatches in two runs each has two nodes: the first is sent while the second is computed."""
    plan, optimizer = replace(PLAN, microbatches=M), OptimizerConfig(**OPTIMIZERS["sgd"])
    single = train_single(TinyTask(), replace(CONFIG, plan=plan), optimizer, SLICES)
    monkeypatch.setattr("workers.param_server.host_memory", _LateMemory)
    monkeypatch.setattr(Replica, "integers", _late_integers)
    config = replace(CONFIG, plan=plan, num_workers=num_workers, overlap=overlap, early_forward=early_forward)
    _assert_equal(train_workers(TinyTask(), config, optimizer, SLICES), single)
    _coming.clear()


def test_an_integer_buffer_that_differs_is_an_error_also_where_sums_come_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.param_server.host_memory", _LateMemory)
    with pytest.raises(ReplicaMismatch, match="samples_seen"):
        train_workers(_CountingTask(), CONFIG, OptimizerConfig(**OPTIMIZERS["sgd"]), SLICES)


def test_the_run_had_what_makes_equality_hard() -> None:
    run = _single("sgd")
    rows = [row for step in run.steps for row in step.commit.stats]
    assert any(row.samples == 0 for row in rows), "no empty microbatch"
    assert any(row.samples > 0 and row.weight == 0 for row in rows), "no microbatch that scores nothing"
    assert {row.samples for row in run.steps[0].commit.stats} == {3, 4}, "no unequal microbatches"
    assert run.state.integers["norm.num_batches_tracked"] == PLAN.steps
    assert not torch.equal(run.state.values["norm.running_mean"], torch.zeros(8))
    assert len({step.loss for step in run.steps}) == PLAN.steps
    assert all(torch.isfinite(torch.tensor(step.loss)) for step in run.steps)


def test_each_of_the_settings_makes_a_difference() -> None:
    """Equality would mean little if runs did not differ where they should."""
    other_seed = replace(CONFIG, plan=replace(PLAN, seed=4))
    runs = [_single(name) for name in OPTIMIZERS]
    runs.append(train_single(TinyTask(), other_seed, OptimizerConfig(**OPTIMIZERS["sgd"]), SLICES))
    for run, other in itertools.combinations(runs, 2):
        assert run.fingerprint != other.fingerprint


def test_slice_size_does_not_change_bits() -> None:
    optimizer = OptimizerConfig(**OPTIMIZERS["sgd"])
    _assert_equal(train_single(TinyTask(), CONFIG, optimizer, ServerConfig()), _single("sgd"))


def test_frozen_keys_stay_and_are_part_of_the_state() -> None:
    run = _single("frozen")
    assert run.state.constants.keys() == {"stem.weight", "stem.bias"}
    assert run.state.state_dict().keys() == _single("sgd").state.state_dict().keys()
    assert "stem.weight" not in run.state.optimizer


def test_a_run_that_went_on_from_a_state_equals_one_that_never_stopped() -> None:
    optimizer = OptimizerConfig(**OPTIMIZERS["sgd"])
    for steps in (1, 2, 3):
        half = replace(CONFIG, plan=replace(PLAN, steps=steps))
        state = train_single(TinyTask(), half, optimizer, SLICES).state
        assert state.version == steps
        alone = train_single(TinyTask(), CONFIG, optimizer, SLICES, resume=state)
        config, servers = replace(CONFIG, num_workers=2), replace(SLICES, num_servers=2)
        together = train_workers(TinyTask(), config, optimizer, servers, resume=state)
        for run in (alone, together):
            assert run.fingerprint == _single("sgd").fingerprint
            assert run.samples == _single("sgd").samples[steps:]


def test_what_ran_before_in_the_process_does_not_matter() -> None:
    torch.manual_seed(99)
    torch.rand(7)
    run = train_single(TinyTask(), CONFIG, OptimizerConfig(**OPTIMIZERS["sgd"]), SLICES)
    assert run.fingerprint == _single("sgd").fingerprint


def test_evaluation_covers_the_split_once_whatever_the_number_of_workers() -> None:
    config = replace(CONFIG, num_workers=3, eval_every=2)
    run = train_workers(TinyTask(), config, OptimizerConfig(**OPTIMIZERS["sgd"]), SLICES)
    assert [evaluation.step for evaluation in run.evaluations] == [2, 4, 5]
    assert {evaluation.metric.compute()["seen"] for evaluation in run.evaluations} == {13.0}
    assert run.fingerprint == _single("sgd").fingerprint, "an evaluation changed the run"
    alone = train_single(TinyTask(), replace(CONFIG, eval_every=2), OptimizerConfig(**OPTIMIZERS["sgd"]), SLICES)
    _assert_equal(run, alone)


def test_phases_are_exactly_the_eight_and_no_longer_than_the_step() -> None:
    for run in (_single("sgd"), _workers("sgd", 2, 2)):
        for step in run.steps:
            assert tuple(step.phases_ms) == PHASES
            assert all(value >= 0 for value in step.phases_ms.values())
            assert sum(step.phases_ms.values()) <= step.step_ms


class _CountingTask(TinyTask):
    """Its integer buffer counts samples: another number in every microbatch of another size."""

    def build_model(self) -> torch.nn.Module:
        model = super().build_model()
        model.register_buffer("samples_seen", torch.tensor(0))
        return model

    def loss(self, model: Any, batch: Any) -> Any:
        model.samples_seen += len(batch)
        return super().loss(model, batch)


@pytest.mark.parametrize("num_workers", [0, 1, 2, 4])
def test_an_integer_buffer_that_differs_between_microbatches_is_an_error_whoever_computes_them(
    num_workers: int,
) -> None:
    """0 stands for ``single``. Within one worker's run as well, or ``single`` would accept what four refuse (E4)."""
    config = replace(CONFIG, num_workers=max(1, num_workers))
    train = train_workers if num_workers else train_single
    with pytest.raises(ReplicaMismatch, match="samples_seen"):
        train(_CountingTask(), config, OptimizerConfig(lr=0.1), SLICES)


class _MaskTask(TinyTask):
    """Has a buffer with infinities that no step touches, as attention masks are."""

    def build_model(self) -> torch.nn.Module:
        model = super().build_model()
        model.register_buffer("mask", torch.tensor([0.0, -torch.inf, torch.inf, 0.1]))
        return model


def test_a_buffer_with_infinities_that_nobody_touches_keeps_them() -> None:
    run = train_single(_MaskTask(), CONFIG, OptimizerConfig(lr=0.1), SLICES)
    assert torch.equal(run.state.values["mask"], torch.tensor([0.0, -torch.inf, torch.inf, 0.1]))


class _DrawingTask(TinyTask):
    """Notes what the global generator gives to each forward pass, by the samples of its microbatch."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: dict[tuple[int, ...], float] = {}

    def loss(self, model: Any, batch: Any) -> Any:
        self.drawn[tuple(batch.ids.tolist())] = float(torch.rand(()))
        return super().loss(model, batch)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_dropout_draws_from_the_seed_the_step_and_the_microbatch(num_workers: int) -> None:
    task, optimizer = _DrawingTask(), OptimizerConfig(lr=0.1)
    run = train_workers(task, replace(CONFIG, num_workers=num_workers, evaluate=False), optimizer, SLICES)
    wanted = {}
    for step, microbatches in enumerate(run.samples):
        for index, samples in microbatches:
            if samples:
                with seeded("microbatch", PLAN.seed, step, index):
                    wanted[tuple(samples)] = float(torch.rand(()))
    assert task.drawn == wanted
    assert len(set(wanted.values())) == len(wanted) == 17
