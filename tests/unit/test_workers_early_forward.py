"""An early forward pass waits for exactly what it is about to read."""

from collections.abc import Sequence
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paramserver.config import OptimizerConfig, ServerConfig
from paramserver.fingerprint import fingerprint
from paramserver.partition import BUFFERS, Slice
from paramserver.server import Server
from paramserver.server_memory import ServerMemory
from paramserver.state import assemble
from paramserver.transport.hub import Hub
from paramserver.transport.shared_memory import SharedMemoryTransport
from paramserver.transport.versions import VersionsArena
from tests.support.servers import TIMEOUT_S
from tests.support.tiny_task import TinyTask
from tests.support.training import train_single
from workers.assembly import build_param_server_worker, build_parts
from workers.config import PlanConfig, WorkerConfig
from workers.early_forward import EarlyForward
from workers.replica import Replica, describe_model
from workers.report import StepReport


class _Net(nn.Module):
    """Reads ``first`` and ``last`` as modules, and ``borrowed``'s weight without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.borrowed = nn.Linear(8, 8)
        self.last = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)

    def forward(self, value: Tensor) -> Tensor:
        assert self.last.weight.device == value.device, "looked at, but not read"
        value = self.norm(self.first(value))
        return self.last(F.linear(value, self.borrowed.weight))


class _Case:
    """A replica whose next version is written slice by slice, as it is asked for."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        model = _Net()
        self.partition, state = describe_model(model, OptimizerConfig(), ServerConfig(slice_bytes=256))
        self.replica = Replica(model, self.partition)
        self.next = self.partition.flatten(state.values) * 2.0
        self.vector = torch.full_like(self.next, torch.nan)
        self.brought: list[list[Slice]] = []
        self.early = EarlyForward(self.replica, self.bring)

    def bring(self, pieces: Sequence[Slice]) -> None:
        self.brought.append(list(pieces))
        for piece in pieces:
            self.vector[piece.start : piece.stop] = self.next[piece.start : piece.stop]

    def keys(self, call: int) -> set[str]:
        return {key.name for piece in self.brought[call] for key, _, _ in self.partition.pieces[piece.index]}


@pytest.fixture
def case() -> _Case:
    return _Case()


def test_each_module_waits_for_its_own_parameters(case: _Case) -> None:
    batch = torch.randn(4, 8)
    with case.early.watched():
        case.replica.model(batch)
    assert case.early.learned
    assert not case.brought
    case.replica.point_to(case.vector)
    with case.early.early():
        case.replica.reset_buffers()
        early = case.replica.model(batch)
    assert [case.keys(call) for call in range(len(case.brought))] == [
        {
            *("norm.running_mean", "norm.running_var"),
            *("borrowed.weight", "borrowed.bias", "unused.weight", "unused.bias"),  # modules that are not entered
        },
        {"first.weight", "first.bias"},
        {"norm.weight", "norm.bias"},
        {"last.weight", "last.bias"},
    ]
    assert len({piece.index for call in case.brought for piece in call}) == sum(map(len, case.brought)), "each once"
    assert case.early.waited_s > 0
    case.early.bring_rest()
    assert len(case.brought) == 4, "nothing is left"
    case.replica.point_to(case.next)
    case.replica.reset_buffers()
    assert torch.equal(early, case.replica.model(batch))


def test_a_parameter_that_another_way_through_the_model_reads_is_waited_for(case: _Case) -> None:
    batch = torch.randn(4, 8)
    with case.early.watched():
        case.replica.model(batch)
    case.replica.point_to(case.vector)
    with case.early.early():
        early = F.linear(batch, case.replica.model.last.weight)
    assert {"last.weight"} <= case.keys(1)
    assert torch.equal(early, F.linear(batch, case.partition.unflatten(case.next)["last.weight"]))
    case.early.bring_rest()
    assert not case.vector.isnan().any()


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_a_scripted_module_reads_is_there_before_the_pass() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    model[1] = torch.jit.trace(model[1], torch.zeros(1, 4))
    partition, _ = describe_model(model, OptimizerConfig(), ServerConfig(slice_bytes=256))
    brought: list[Slice] = []
    early = EarlyForward(Replica(model, partition), brought.extend)
    with early.watched():
        model(torch.zeros(1, 4))
    with early.early():
        assert {key.name for piece in brought for key, _, _ in partition.pieces[piece.index]} == {
            "1.0.weight",
            "1.0.bias",
        }


def test_an_ordinary_pass_waits_for_nothing(case: _Case) -> None:
    case.replica.model(torch.randn(4, 8))
    assert not case.brought


def test_buffers_are_there_before_the_pass_begins(case: _Case) -> None:
    with case.early.early():
        assert {piece.group for piece in case.brought[0]} == {BUFFERS}


PLAN = PlanConfig(batch_size=15, microbatches=4, steps=6, seed=3)
OPTIMIZER = OptimizerConfig(lr=0.1, momentum=0.9, weight_decay=1e-3)
SERVERS = ServerConfig(slice_bytes=512)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_run_that_begins_early_has_the_bits_of_one_that_waits(overlap: bool) -> None:
    """A real hub and its sockets; 31 samples: the third step has one sample, and evaluation pauses the fourth."""
    config = WorkerConfig(plan=PLAN, overlap=overlap, early_forward=True, eval_every=3, step_timeout_s=TIMEOUT_S)
    parts = build_parts(TinyTask(), config, OPTIMIZER, SERVERS)
    versions = VersionsArena.create(parts.partition)
    about = (OPTIMIZER, PLAN.microbatches, parts.state)
    memory = ServerMemory(parts.partition, 0, *about, versions.vectors)
    server = Server(0, parts.partition, *about, memory=memory)
    hub = Hub(server, versions, threads=2, least_elements=1)
    transport = SharedMemoryTransport({0: hub.address}, parts.partition)
    worker, backend = build_param_server_worker(TinyTask(), config, parts.replica, transport)
    with mock.patch.object(backend, "ahead", wraps=backend.ahead) as ahead:
        reports = [report for report in worker.run() if isinstance(report, StepReport)]
    state = assemble(parts.partition, [hub.call(lambda: server.snapshot(PLAN.steps)).result(TIMEOUT_S)])
    backend.close()
    hub.close()
    single = train_single(TinyTask(), config, OPTIMIZER, SERVERS)
    assert fingerprint(state.state_dict()) == single.fingerprint
    assert [report.loss for report in reports] == [report.loss for report in single.steps]
    assert ahead.call_count == 4, "not before the evaluation, nor after the last step"
