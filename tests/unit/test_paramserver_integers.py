"""Integer and boolean buffers in one block."""

import pickle

import pytest
import torch

from paramserver.integers import IntegerBlock

BUFFERS = {
    "seen": torch.tensor(7),
    "mask": torch.tensor([[True], [False], [True]]),
    "small": torch.tensor([-1, 2, 3], dtype=torch.int8),
    "empty": torch.zeros(0, dtype=torch.int32),
}


def _equal(one: IntegerBlock, buffers: dict[str, torch.Tensor]) -> bool:
    return one.keys() == buffers.keys() and all(
        one[name].dtype == value.dtype and torch.equal(one[name], value) for name, value in buffers.items()
    )


def test_a_block_has_the_buffers_and_is_a_copy() -> None:
    buffers = {name: value.clone() for name, value in BUFFERS.items()}
    block = IntegerBlock.pack(buffers)
    buffers["seen"].add_(1)
    assert _equal(block, BUFFERS)
    assert len(block) == 4


def test_its_tensors_are_views() -> None:
    block = IntegerBlock.pack(BUFFERS)
    snapped = block.snap()
    block["seen"].add_(1)
    assert block["seen"] == 8
    assert _equal(snapped, BUFFERS)


def test_the_order_of_the_names_does_not_matter() -> None:
    other = IntegerBlock.pack(dict(reversed(BUFFERS.items())))
    assert IntegerBlock.pack(BUFFERS).same(other)


@pytest.mark.parametrize(
    "change",
    [{"seen": torch.tensor(8)}, {"seen": torch.tensor(7, dtype=torch.int32)}, {"new": torch.tensor(1)}],
    ids=["content", "dtype", "keys"],
)
def test_blocks_differ_by_content_dtype_and_keys(change: dict[str, torch.Tensor]) -> None:
    assert not IntegerBlock.pack(BUFFERS).same(IntegerBlock.pack({**BUFFERS, **change}))
    assert not IntegerBlock.pack(BUFFERS).same(BUFFERS), "a plain mapping is no block"


def test_it_travels() -> None:
    block = IntegerBlock.pack(BUFFERS)
    arrived = pickle.loads(pickle.dumps(block))
    assert arrived.same(block)
    assert _equal(arrived, BUFFERS)
    assert _equal(pickle.loads(pickle.dumps(IntegerBlock.pack({}))), {})


def test_assign_takes_blocks_and_parts() -> None:
    block = IntegerBlock.pack(BUFFERS)
    block.assign(IntegerBlock.pack({**BUFFERS, "seen": torch.tensor(9)}))
    assert block["seen"] == 9
    block.assign({"small": torch.tensor([4, 5, 6], dtype=torch.int8)})
    assert block["small"].tolist() == [4, 5, 6]
    assert block["seen"] == 9


def test_updated_replaces_what_the_other_has() -> None:
    block = IntegerBlock.pack(BUFFERS)
    assert block.updated({}) is block
    other = block.updated({"seen": torch.tensor(8)})
    assert _equal(other, {**BUFFERS, "seen": torch.tensor(8)})
    assert _equal(block, BUFFERS)
    assert IntegerBlock.pack({}).updated(block) is block
