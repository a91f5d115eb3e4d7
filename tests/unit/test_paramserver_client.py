"""The client between one worker and all servers, and the waits of servers in one process."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from paramserver.client import Client
from paramserver.config import OptimizerConfig, ServerConfig
from paramserver.errors import NonFiniteGradient, PartitionMismatch, StepTimeout
from paramserver.messages import Push
from paramserver.partition import KeySpec, make_partition
from paramserver.reduction import Node
from paramserver.transport.in_process import InProcessTransport
from tests.support.servers import Fleet, rows_of


def _fleet(**settings: object) -> Fleet:
    return Fleet({"a": torch.arange(200.0), "b": torch.ones(3)}, num_servers=3, **settings)  # type: ignore[arg-type]


def test_a_client_that_cuts_otherwise_is_refused_before_its_first_push() -> None:
    fleet = _fleet()
    other = make_partition([KeySpec("a", (200,), (1,), 0)], ServerConfig(num_servers=3, slice_bytes=256))
    with pytest.raises(PartitionMismatch, match="worker 2 and server 0 cut the parameters differently"):
        Client(2, other, InProcessTransport(fleet.group), 1.0)


def test_pull_puts_every_key_at_its_place() -> None:
    fleet = _fleet()
    out = torch.full((fleet.partition.length,), torch.nan)
    fleet.client().pull(0, out)
    views = fleet.partition.unflatten(out)
    assert torch.equal(views["a"], torch.arange(200.0))
    assert torch.equal(views["b"], torch.ones(3))
    assert out.isfinite().all(), "padding is part of the slices"


def test_a_commit_adds_the_servers_busy_times() -> None:
    fleet = _fleet()
    commit = fleet.step({"a": torch.ones(200)})
    assert commit.server_ms.keys() == {"aggregate", "update", "commit"}
    assert commit.server_ms["aggregate"] + commit.server_ms["update"] > 0
    assert commit.last_worker == 0


def test_a_wait_past_its_deadline_names_the_missing_microbatches() -> None:
    fleet = _fleet(num_microbatches=4)
    client = fleet.client(timeout_s=0.0)
    client.push(0, Node(0, 2), torch.zeros(fleet.partition.length), rows_of(Node(0, 2)), {})
    with pytest.raises(StepTimeout, match=r"step 1: server 0 waits for microbatches \[2, 3\]"):
        client.wait(1)
    client.push(0, Node(2, 4), torch.zeros(fleet.partition.length), rows_of(Node(2, 4)), {})
    assert client.wait(1).version == 1


def test_all_waiting_workers_hear_of_a_failure() -> None:
    fleet = _fleet(num_microbatches=3)
    pushed = threading.Barrier(3)

    def work(worker: int) -> str:
        client = fleet.client(worker)
        node = Node(worker, worker + 1)
        bad = torch.full((fleet.partition.length,), torch.nan if worker == 1 else 0.0)
        client.push(0, node, bad, rows_of(node), {})
        pushed.wait()
        with pytest.raises(NonFiniteGradient, match="'a' is not finite in step 1"):
            client.wait(1)
        return "heard"

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, range(3))) == ["heard"] * 3


def test_a_worker_that_waits_first_is_woken_by_the_push_of_another() -> None:
    fleet = _fleet(num_microbatches=2, optimizer=OptimizerConfig(lr=1.0, clip_grad_norm=1e9))
    zeros = torch.zeros(fleet.partition.length)
    with ThreadPoolExecutor(1) as pool:
        first, second = fleet.client(0), fleet.client(1)
        first.push(0, Node(0, 1), zeros, rows_of(Node(0, 1)), {})
        waiting = pool.submit(first.wait, 1)
        second.push(0, Node(1, 2), zeros, rows_of(Node(1, 2)), {})
        assert second.wait(1).last_worker == 1
        assert waiting.result().version == 1


def test_pushed_memory_may_be_overwritten_once_the_wait_has_returned() -> None:
    fleet = _fleet()
    client, gradient = fleet.client(), torch.ones(fleet.partition.length)
    client.push(0, Node(0, 1), gradient, rows_of(Node(0, 1)), {})
    client.wait(1)
    gradient.fill_(1e9)
    assert torch.equal(fleet.state().values["b"], torch.zeros(3))
    client.push(1, Node(0, 1), torch.ones_like(gradient), rows_of(Node(0, 1)), {})
    client.wait(2)
    assert torch.equal(fleet.state().values["b"], torch.full((3,), -1.0))


def test_a_server_hears_of_the_slices_that_it_has_and_without_any_of_each_push() -> None:
    fleet = Fleet({"a": torch.arange(100.0)}, num_servers=3, slice_bytes=256)
    has = [bool(pieces) for pieces in fleet.partition.by_server]
    heard: list[int] = []

    class Listened(InProcessTransport):
        def push(self, server: int, push: Push) -> None:
            heard.append(server)
            super().push(server, push)

    client = Client(0, fleet.partition, Listened(fleet.group), 5.0)
    for piece in fleet.partition.slices:
        heard.clear()
        client.push(0, Node(0, 1), torch.ones(fleet.partition.length), rows_of(Node(0, 1)), {}, [piece])
        assert heard == [server for server in range(3) if server == piece.server or not has[server]]
    assert client.wait(1).version == 1
    assert has.count(False) == 1, "the case has a server without slices"
