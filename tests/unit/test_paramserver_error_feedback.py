"""Nothing is lost by rounding: what was sent and what is still owed add up to what was given."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from paramserver.config import WirePrecision
from paramserver.error_feedback import ErrorFeedback
from paramserver.reduction import Node
from paramserver.residuals import residuals_by_key, residuals_by_slice
from tests.support.servers import Fleet, bits_equal

PRECISIONS: list[WirePrecision] = ["bf16", "fp16"]
NODE = Node(0, 1)
SHAPES = {"conv": (4, 3, 3, 3), "bias": (), "large": (23, 17), "bn.mean": (5,)}


def _fleet(num_servers: int = 1, slice_bytes: int = 256) -> Fleet:
    values = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    values["conv"] = values["conv"].contiguous(memory_format=torch.channels_last)
    return Fleet(values, buffers=["bn.mean"], num_servers=num_servers, slice_bytes=slice_bytes, num_microbatches=4)


def _values(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def _send(feedback: ErrorFeedback, fleet: Fleet, step: int, values: dict[str, Tensor], node: Node = NODE) -> Tensor:
    """What arrives: a flat vector, widened."""
    push = fleet.push(step, node, values)
    flat = torch.zeros(fleet.partition.length)
    for index, rounded in feedback.round(push).items():
        assert rounded.dtype == feedback.dtype
        flat[fleet.partition.slices[index].start : fleet.partition.slices[index].stop] = rounded.float()
    return flat


def _owed(feedback: ErrorFeedback, fleet: Fleet, version: int, node: Node = NODE) -> Tensor:
    flat = torch.zeros(fleet.partition.length)
    for (index, held), value in feedback.residuals(version).items():
        if held == node:
            flat[fleet.partition.slices[index].start : fleet.partition.slices[index].stop] = value
    return flat


def _one(value: float) -> dict[str, Tensor]:
    return {"large": torch.full(SHAPES["large"], value)}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1.0, 1e4])
def test_what_was_sent_and_what_is_owed_is_what_was_given(precision: WirePrecision, scale: float) -> None:
    fleet = _fleet()
    feedback = ErrorFeedback(precision, fleet.partition)
    sent = given_ = torch.zeros(fleet.partition.length, dtype=torch.float64)
    for step in range(20):
        values = {**_values(step, scale), "bn.mean": torch.zeros(5)}
        given_ = given_ + fleet.flatten(values)
        sent = sent + _send(feedback, fleet, step, values)
    left = _owed(feedback, fleet, 20)
    assert float((sent + left - given_).abs().max()) <= 20 * 2e-7 * 5 * scale
    assert float(left.abs().max()) <= 5 * scale * 2**-8 or precision == "fp16"
    assert not torch.equal(left, torch.zeros_like(left))


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=8), st.sampled_from(PRECISIONS))
def test_a_step_is_exact_to_the_bit(values: list[float], precision: WirePrecision) -> None:
    """Of one addition nothing is lost: c = q + r holds in fp32, where nothing saturates."""
    fleet = _fleet()
    feedback = ErrorFeedback(precision, fleet.partition)
    owed = torch.zeros(fleet.partition.length)
    for step, value in enumerate(values):
        whole = owed + fleet.flatten(_one(value))
        sent, owed = _send(feedback, fleet, step, _one(value)), _owed(feedback, fleet, step + 1)
        if float(whole.abs().max()) <= torch.finfo(feedback.dtype).max:
            assert torch.equal(sent + owed, whole)
            assert torch.equal(sent.double() + owed.double(), whole.double())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_16_bits_can_hold_passes_unchanged(precision: WirePrecision) -> None:
    fleet = _fleet()
    feedback = ErrorFeedback(precision, fleet.partition)
    for step in range(3):
        held = {name: value.to(feedback.dtype).float() for name, value in _values(step).items()}
        held["bn.mean"] = torch.zeros(5)
        assert torch.equal(_send(feedback, fleet, step, held), fleet.flatten(held))
        assert not _owed(feedback, fleet, step + 1).any()


def test_what_is_too_small_for_fp16_is_sent_once_there_is_enough_of_it() -> None:
    fleet = _fleet()
    feedback = ErrorFeedback("fp16", fleet.partition)
    tiny = 2.0**-27
    sent = sum(_send(feedback, fleet, step, _one(tiny)).max().item() for step in range(64))
    assert sent + _owed(feedback, fleet, 64).max().item() == 64 * tiny
    assert sent > 32 * tiny


def test_fp16_saturates_and_owes_the_rest() -> None:
    fleet = _fleet()
    feedback = ErrorFeedback("fp16", fleet.partition)
    for step, (value, sent, owed) in enumerate(
        [(1e5, 65504.0, 34496.0), (0.0, 34496.0, 0.0), (-1e5, -65504.0, -34496.0)]
    ):
        assert _send(feedback, fleet, step, _one(value))[fleet.partition.keys[2].offset] == sent
        assert _owed(feedback, fleet, step + 1)[fleet.partition.keys[2].offset] == owed


def test_bf16_rounds_no_finite_number_to_infinity() -> None:
    fleet = _fleet()
    feedback = ErrorFeedback("bf16", fleet.partition)
    assert _send(feedback, fleet, 0, _one(torch.finfo(torch.float32).max)).isfinite().all()
    assert _owed(feedback, fleet, 1).isfinite().all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_goes_as_it_is_and_poisons_nothing(precision: WirePrecision, value: float) -> None:
    fleet = _fleet()
    feedback = ErrorFeedback(precision, fleet.partition)
    start = fleet.partition.keys[2].offset
    _send(feedback, fleet, 0, _one(1 / 3))
    owed = _owed(feedback, fleet, 1)[start]
    spoilt = _one(1 / 3)
    spoilt["large"][0, 0] = value
    sent = _send(feedback, fleet, 1, spoilt)
    assert torch.equal(sent[start], torch.tensor(value)) or (math.isnan(value) and sent[start].isnan())
    left = _owed(feedback, fleet, 2)
    assert left[start] == 0.0
    assert sent[start + 1] + left[start + 1] == owed + torch.tensor(1 / 3), "its neighbour is as ever"
    assert left.isfinite().all()
    assert _send(feedback, fleet, 2, _one(0.5))[start] == 0.5


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_repetition_sends_the_same_bits_and_owes_nothing_twice(precision: WirePrecision) -> None:
    fleet = _fleet()
    feedback, once = (ErrorFeedback(precision, fleet.partition) for _ in range(2))
    for step in range(3):
        first = _send(feedback, fleet, step, _values(step))
        again = _send(feedback, fleet, step, _values(step))
        assert torch.equal(first, again)
        assert torch.equal(first, _send(once, fleet, step, _values(step)))
    assert torch.equal(_owed(feedback, fleet, 3), _owed(once, fleet, 3))


def test_a_push_is_not_modified_and_its_buffers_are_left_alone() -> None:
    fleet = _fleet()
    feedback = ErrorFeedback("bf16", fleet.partition)
    values = _values(0)
    push = fleet.push(0, NODE, values)
    before = {index: value.clone() for index, value in push.slices.items()}
    rounded = feedback.round(push)
    assert all(torch.equal(push.slices[index], value) for index, value in before.items())
    buffers = {piece.index for piece in fleet.partition.slices if piece.group < 0}
    assert buffers == before.keys() - rounded.keys()


def test_tree_nodes_owe_separately() -> None:
    fleet = _fleet()
    feedback = ErrorFeedback("bf16", fleet.partition)
    _send(feedback, fleet, 0, _one(1 / 3), Node(0, 1))
    _send(feedback, fleet, 0, _one(1.0), Node(1, 2))
    assert _owed(feedback, fleet, 1, Node(0, 1)).any()
    assert not _owed(feedback, fleet, 1, Node(1, 2)).any()


def test_a_dropped_step_is_taken_back() -> None:
    fleet = _fleet()
    feedback, undisturbed = (ErrorFeedback("bf16", fleet.partition) for _ in range(2))
    for found in (feedback, undisturbed):
        _send(found, fleet, 0, _values(0))
    _send(feedback, fleet, 1, _values(7, scale=1e3))
    for _ in range(2):  # every server says so
        feedback.take_back(1)
    assert torch.equal(_owed(feedback, fleet, 2), _owed(undisturbed, fleet, 1))
    assert torch.equal(_send(feedback, fleet, 2, _values(2)), _send(undisturbed, fleet, 1, _values(2)))


def test_residuals_go_when_the_membership_changes() -> None:
    fleet = _fleet()
    feedback = ErrorFeedback("bf16", fleet.partition)
    feedback.round(fleet.push(0, NODE, _values(0)))
    sent = feedback.round(fleet.push(1, NODE, _values(1), generation=1))
    fresh = ErrorFeedback("bf16", fleet.partition).round(fleet.push(1, NODE, _values(1)))
    assert all(torch.equal(sent[index], fresh[index]) for index in fresh)


def test_a_held_version_is_kept_until_it_was_read() -> None:
    fleet = _fleet()
    feedback = ErrorFeedback("fp16", fleet.partition, held_versions=[2])
    wanted = {}
    for step in range(5):
        _send(feedback, fleet, step, _values(step))
        wanted[step + 1] = _owed(feedback, fleet, step + 1)
    assert torch.equal(_owed(feedback, fleet, 2), wanted[2])
    assert not torch.equal(wanted[2], wanted[5])
    feedback.residuals(2, release=True)
    with pytest.raises(AssertionError, match="version 2 is not held"):
        feedback.residuals(2)


def test_a_version_that_was_given_free_is_not_kept() -> None:
    """A checkpoint may ask before the next push, and does not ask for what the run began with."""
    fleet = _fleet()
    feedback = ErrorFeedback("fp16", fleet.partition, held_versions=[0, 2])
    _send(feedback, fleet, 0, _values(0))
    _send(feedback, fleet, 1, _values(1))
    feedback.residuals(2, release=True)
    _send(feedback, fleet, 2, _values(2))
    assert not feedback._kept


def test_the_version_before_the_one_under_way_can_be_read() -> None:
    fleet = _fleet()
    feedback = ErrorFeedback("bf16", fleet.partition)
    _send(feedback, fleet, 0, _values(0))
    wanted = _owed(feedback, fleet, 1)
    _send(feedback, fleet, 1, _values(1))
    assert torch.equal(_owed(feedback, fleet, 1), wanted)


@pytest.mark.parametrize(("num_servers", "slice_bytes"), [(1, 1024), (3, 512)])
def test_by_key_residuals_go_on_with_other_slices_and_servers(num_servers: int, slice_bytes: int) -> None:
    one, other = _fleet(), _fleet(num_servers, slice_bytes)
    feedback = ErrorFeedback("bf16", one.partition)
    for step in range(3):
        _send(feedback, one, step, _values(step))
    by_key = residuals_by_key(one.partition, feedback.residuals(3))
    assert by_key.keys() == {NODE}
    assert {name: tuple(value.shape) for name, value in by_key[NODE].items()} == {
        name: shape for name, shape in SHAPES.items() if name != "bn.mean"
    }
    resumed = ErrorFeedback("bf16", other.partition, residuals_by_slice(other.partition, by_key))
    again = residuals_by_key(other.partition, resumed.residuals(3))
    assert bits_equal(again[NODE], by_key[NODE])
    sent = one.partition.unflatten(_send(feedback, one, 3, _values(3)))
    found = torch.zeros(other.partition.length)
    for server in range(num_servers):
        for index, value in resumed.round(other.push(3, NODE, _values(3), server)).items():
            piece = other.partition.slices[index]
            found[piece.start : piece.stop] = value.float()
    assert bits_equal(other.partition.unflatten(found), sent)


def test_what_nobody_owes_is_no_residual() -> None:
    fleet = _fleet()
    zeros = {node: {"large": torch.zeros(SHAPES["large"])} for node in (Node(0, 1), Node(1, 2))}
    zeros[Node(1, 2)]["large"][0, 0] = 1.0
    assert len(residuals_by_slice(fleet.partition, zeros)) == 1
