"""Contributions in 16 bits reach real server actors: half the bytes, fp32 sums, and nothing lost over the steps."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from paramserver.client import Client
from paramserver.config import OptimizerConfig, WirePrecision
from paramserver.error_feedback import ErrorFeedback
from paramserver.errors import NonFiniteGradient
from paramserver.reduction import Node
from paramserver.residuals import residuals_by_key
from paramserver.transport.shared_memory import SharedMemoryTransport
from tests.support.links import RayLink, ray_link
from tests.support.servers import TIMEOUT_S, Fleet, bits_equal, rows_of

pytestmark = [
    # Arrays out of Ray's store are read-only; they are never written. A worker actor says the same.
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable"),
]

NUM_SERVERS = 2
M = 2
LEAVES = [Node(0, 1), Node(1, 2)]
ROUNDED: list[WirePrecision] = ["bf16", "fp16"]


@pytest.fixture(scope="module")
def link() -> Iterator[RayLink]:
    with ray_link(NUM_SERVERS) as started:
        assert isinstance(started, RayLink)
        yield started


def _values(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"conv": (4, 3, 3, 3), "bias": (), "large": (23, 17), "bn.mean": (5,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _fleet(link: RayLink, optimizer: OptimizerConfig | None = None) -> Fleet:
    fleet = Fleet(_values(0), optimizer, num_microbatches=M, num_servers=NUM_SERVERS, buffers=["bn.mean"])
    link.start(fleet)
    return fleet


def _client(link: RayLink, fleet: Fleet, feedback: ErrorFeedback) -> Client:
    from cluster.ray_transport import RayTransport

    return Client(0, fleet.partition, RayTransport(link._used, feedback), TIMEOUT_S)


def _pull(client: Client, fleet: Fleet, version: int) -> dict[str, Tensor]:
    out = torch.empty(fleet.partition.length)
    client.pull(version, out)
    return fleet.partition.unflatten(out)


def _num_bytes(slices: dict[int, Any]) -> int:
    return sum(array.nbytes for array in slices.values())


def test_fp32_travels_as_it_is(link: RayLink) -> None:
    from cluster.ray_transport import from_wire, to_wire

    push = _fleet(link).push(0, LEAVES[0], _values(1))
    wire = to_wire(push)
    assert _num_bytes(wire.slices) == sum(4 * value.numel() for value in push.slices.values())
    arrived = from_wire(wire)
    assert all(arrived.slices[index].equal(value) for index, value in push.slices.items())
    assert (arrived.step, arrived.node, arrived.stats) == (push.step, push.node, push.stats)


@pytest.mark.parametrize("precision", ROUNDED)
def test_16_bits_travel_in_half_the_bytes_and_arrive_in_fp32(link: RayLink, precision: WirePrecision) -> None:
    from cluster.ray_transport import from_wire, to_wire

    fleet = _fleet(link)
    for server in range(NUM_SERVERS):
        push = fleet.push(0, LEAVES[0], _values(1), server)
        wire = to_wire(push, ErrorFeedback(precision, fleet.partition))
        rounded = ErrorFeedback(precision, fleet.partition).round(push)
        buffers = {index: value for index, value in push.slices.items() if index not in rounded}
        assert _num_bytes(wire.slices) == sum(2 * value.numel() for value in rounded.values()) + sum(
            4 * value.numel() for value in buffers.values()
        )
        arrived = from_wire(wire).slices
        assert arrived.keys() == push.slices.keys()
        for index, value in arrived.items():
            assert value.dtype == torch.float32
            assert value.equal(rounded[index].float() if index in rounded else buffers[index])
            assert not rounded or wire.rounded_to == str(rounded[next(iter(rounded))].dtype).removeprefix("torch.")


@pytest.mark.parametrize("precision", ROUNDED)
def test_what_real_servers_sum_is_what_was_given_less_what_is_owed(link: RayLink, precision: WirePrecision) -> None:
    """With SGD at 1 the parameters are the negative sum of all mean gradients; buffers are exact."""
    fleet = _fleet(link, OptimizerConfig(lr=1.0))
    feedback = ErrorFeedback(precision, fleet.partition)
    client = _client(link, fleet, feedback)
    steps = 6
    for step in range(steps):
        for node in LEAVES:
            client.push(step, node, fleet.flatten(_values(100 * step + node.lo)), rows_of(node), {})
        client.wait(step + 1)
    found = _pull(client, fleet, steps)
    owed = residuals_by_key(fleet.partition, feedback.residuals(steps))
    for name, start in _values(0).items():
        given = [_values(100 * step + node.lo)[name].double() for step in range(steps) for node in LEAVES]
        if name == "bn.mean":
            wanted = start.double() + sum(given) / M
        else:
            wanted = start.double() - (sum(given) - sum(owed[node][name].double() for node in LEAVES)) / M
            assert any(owed[node][name].any() for node in LEAVES)
        torch.testing.assert_close(found[name].double(), wanted, rtol=0.0, atol=2e-5)


def test_a_gradient_that_is_not_finite_is_still_named(link: RayLink) -> None:
    fleet = _fleet(link)
    client = _client(link, fleet, ErrorFeedback("fp16", fleet.partition))
    spoilt = {**_values(1), "bias": torch.tensor(math.inf)}
    client.push(0, fleet.root, fleet.flatten(spoilt), rows_of(fleet.root), {})
    with pytest.raises(NonFiniteGradient, match="'bias' is not finite in step 1"):
        client.wait(1)


def test_a_step_that_was_skipped_leaves_what_was_owed_before(link: RayLink) -> None:
    fleet = _fleet(link, OptimizerConfig(lr=1.0, on_nan="skip"))
    feedback = ErrorFeedback("bf16", fleet.partition)
    client = _client(link, fleet, feedback)
    client.push(0, fleet.root, fleet.flatten(_values(1)), rows_of(fleet.root), {})
    client.wait(1)
    before = feedback.residuals(1)
    client.push(1, fleet.root, fleet.flatten({**_values(2), "bias": torch.tensor(math.nan)}), rows_of(fleet.root), {})
    assert client.wait(2).skipped
    after = feedback.residuals(2)
    assert after.keys() == before.keys()
    assert all(after[place].equal(before[place]) for place in before)


def test_a_node_s_relay_rounds_what_it_sends_on_and_gives_its_residuals(link: RayLink) -> None:
    """Its workers push fp32 in shared memory; a held version is read steps later, and taken up by another relay."""
    from cluster.relay import RelayActor
    from cluster.rounding import Rounding

    def relay(rounding: Rounding) -> tuple[RelayActor, Client]:
        actor = RelayActor(fleet.partition, M, 1, "/dev/shm", TIMEOUT_S)
        addresses = actor.open(range(M), link._used, list(range(NUM_SERVERS)), None, rounding)
        return actor, Client(0, fleet.partition, SharedMemoryTransport(addresses, fleet.partition), TIMEOUT_S)

    def train(client: Client, steps: range) -> None:
        for step in steps:
            for node in LEAVES:
                client.push(step, node, fleet.flatten(_values(100 * step + node.lo)), rows_of(node), {})
            client.wait(step + 1)

    def finish(actor: RelayActor, client: Client) -> None:
        client.close()
        for held in actor._relays.values():
            held.close()

    fleet = _fleet(link, OptimizerConfig(lr=0.1, momentum=0.9))
    actor, client = relay(Rounding("bf16", {}, (2,)))
    train(client, range(4))
    held, last = actor.residuals(2, release=True), actor.residuals(4, release=False)
    wanted = {name: value.clone() for name, value in _pull(client, fleet, 4).items()}
    finish(actor, client)
    assert {node for _, node in held} == {fleet.root}
    assert {fleet.partition.slices[index].server for index, _ in held} == set(range(NUM_SERVERS))
    assert any(not held[place].equal(last[place]) for place in held)

    fleet = _fleet(link, OptimizerConfig(lr=0.1, momentum=0.9))
    actor, client = relay(Rounding("bf16", {}, ()))
    train(client, range(2))
    finish(actor, client)
    actor, client = relay(Rounding("bf16", held, ()))
    train(client, range(2, 4))
    assert bits_equal(_pull(client, fleet, 4), wanted)
    again = actor.residuals(4, release=False)
    finish(actor, client)
    assert all(again[place].equal(last[place]) for place in last)
