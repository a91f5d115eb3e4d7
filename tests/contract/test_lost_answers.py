"""Over Ray: an answer that is lost is asked for again, and what is damaged is sent again; nothing is applied twice."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from launch.drivers import param_server_session
from paramserver.config import OptimizerConfig
from paramserver.errors import CorruptTransfer
from paramserver.reduction import Node
from tests.support.links import RayLink
from tests.support.servers import Fleet, rows_of

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
LEAVES = [Node(0, 1), Node(1, 2)]
STEPS = 3


@pytest.fixture(scope="module")
def link() -> Iterator[RayLink]:
    with param_server_session(None, workers=1, servers=2, model_bytes=1 << 20, transport="ray"):
        yield RayLink(2)


def _fleet(link: RayLink, *faults: Any) -> Fleet:
    fleet = Fleet({"w": torch.zeros(300)}, OptimizerConfig(lr=1.0), num_microbatches=2, num_servers=2)
    link.start(fleet, *faults)
    return fleet


def _train(link: RayLink, fleet: Fleet) -> torch.Tensor:
    """Steps of gradient ones: after each, every value is one less."""
    client = link.client(fleet)
    for step in range(STEPS):
        for node in LEAVES:
            client.push(step, node, fleet.flatten({"w": torch.ones(300)}), rows_of(node), {})
        client.wait(step + 1)
    out = torch.empty(fleet.partition.length)
    client.pull(STEPS, out)
    return fleet.partition.unflatten(out)["w"]


@pytest.mark.parametrize("server", [0, 1])
def test_a_push_whose_answer_is_dropped_is_repeated_and_counts_once(link: RayLink, tmp_path: Path, server: int) -> None:
    from cluster import ray_transport
    from workers.faults import Fault, Faults

    faults = Faults((Fault(0, "drop-response", "server", server, 2, "push"),), str(tmp_path))
    fleet = _fleet(link, faults)
    sent: list[Any] = []
    send = ray_transport.RayTransport._send

    def note(self: Any, to: int, push: Any) -> None:
        sent.append(push)
        send(self, to, push)

    with (
        mock.patch.object(ray_transport, "_REPEAT_S", 0.05),
        mock.patch.object(ray_transport, "_UNDER_WAY_BYTES", 0),  # the next push waits for the answer to this one
        mock.patch.object(ray_transport.RayTransport, "_send", note),
    ):
        values = _train(link, fleet)
    assert torch.equal(values, torch.full((300,), -float(STEPS))), "each of the two samples has gradient 1, mean 1"
    assert (tmp_path / "faults" / "0").exists(), "the answer was dropped"
    assert len(sent) > 2 * STEPS * len(LEAVES), "and the push sent again"


def test_a_damaged_push_is_refused_by_name_and_sent_again(link: RayLink) -> None:
    from cluster import ray_transport

    fleet = _fleet(link)
    whole = ray_transport.to_wire
    damaged: list[int] = []

    def damage(push: Any, feedback: Any = None) -> Any:
        wire = whole(push, feedback)
        if not damaged and wire.slices:
            index = next(iter(wire.slices))
            damaged.append(index)
            return wire._replace(checksums={**wire.checksums, index: 0})
        return wire

    with mock.patch.object(ray_transport, "to_wire", damage), pytest.raises(CorruptTransfer, match="not what was sent"):
        _train(link, fleet)
    assert torch.equal(_train(link, _fleet(link)), torch.full((300,), -float(STEPS)))
