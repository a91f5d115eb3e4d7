"""What a worker holds is compared with what its servers committed: a damaged value ends the run by its key's name."""

from collections.abc import Iterator

import pytest
import torch

from paramserver.config import OptimizerConfig, ServerConfig
from paramserver.errors import ReplicaMismatch
from paramserver.server import Server
from paramserver.server_memory import ServerMemory
from paramserver.transport.hub import Hub
from paramserver.transport.shared_memory import SharedMemoryTransport
from paramserver.transport.versions import VersionsArena
from tests.support.servers import TIMEOUT_S
from tests.support.tiny_task import TinyTask
from workers.assembly import build_param_server_worker, build_parts
from workers.config import PlanConfig, WorkerConfig
from workers.worker import Worker

PLAN = PlanConfig(batch_size=6, microbatches=2, steps=6)
CONFIG = WorkerConfig(plan=PLAN, evaluate=False, step_timeout_s=TIMEOUT_S)
OPTIMIZER = OptimizerConfig(lr=0.1, momentum=0.9)


@pytest.fixture
def case() -> Iterator[tuple[Worker, Hub]]:
    """A worker and a server of shared memory that send checksums of every other version."""
    parts = build_parts(TinyTask(), CONFIG, OPTIMIZER, ServerConfig(slice_bytes=512))
    versions = VersionsArena.create(parts.partition)
    about = (OPTIMIZER, PLAN.microbatches, parts.state)
    memory = ServerMemory(parts.partition, 0, *about, versions.vectors)
    hub = Hub(Server(0, parts.partition, *about, memory=memory, verify_every=2), versions)
    transport = SharedMemoryTransport({0: hub.address}, parts.partition)
    worker, backend = build_param_server_worker(TinyTask(), CONFIG, parts.replica, transport)
    yield worker, hub
    backend.close()
    hub.close()


def test_what_is_whole_is_not_complained_of(case: tuple[Worker, Hub]) -> None:
    assert len(list(case[0].run())) == PLAN.steps


@pytest.mark.parametrize("number", [0, -1])
def test_a_flipped_bit_is_named_by_its_key_and_step(case: tuple[Worker, Hub], number: int) -> None:
    worker, hub = case
    key = hub._server.partition.keys[number]
    reports = worker.run()
    for _ in range(2):
        next(reports)
    key.view(hub.versions.vectors[0]).view(torch.int32)[(0,) * len(key.shape)] ^= 1 << 20
    with pytest.raises(ReplicaMismatch, match=rf"committed in step 2: '{key.name}' differs.*--verify-every") as caught:
        next(reports)
    assert caught.value.details == {"key": key.name, "step": 2}
