"""SHA-256 of a state: known answers, and what it depends on."""

import hashlib
import struct
from collections import OrderedDict

import pytest
import torch
from torch import Tensor

from paramserver.fingerprint import fingerprint


def test_known_answer() -> None:
    state = {
        "b": torch.tensor([[1.0, -2.0], [0.5, 0.0]]),
        "a": torch.tensor(7),
        "c": torch.tensor([True, False]),
    }
    digest = hashlib.sha256()
    digest.update(b"a\0torch.int64\0()\0" + struct.pack("<q", 7))
    digest.update(b"b\0torch.float32\0(2, 2)\0" + struct.pack("<4f", 1.0, -2.0, 0.5, 0.0))
    digest.update(b"c\0torch.bool\0(2,)\0" + b"\1\0")
    assert fingerprint(state) == digest.hexdigest()


def test_a_known_answer_as_digits() -> None:
    """Guards against a change of the formula on both sides of the test above: fingerprints are kept in files."""
    assert fingerprint({}) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    wanted = hashlib.sha256(b"w\0torch.float32\0(1,)\0\x00\x00\x80\x3f").hexdigest()
    assert fingerprint({"w": torch.ones(1)}) == wanted


def test_it_depends_neither_on_key_order_nor_on_memory_layout_nor_on_gradients() -> None:
    weight, bias = torch.randn(4, 3, 5, 5), torch.randn(4)
    plain = fingerprint({"weight": weight, "bias": bias})
    assert fingerprint(OrderedDict(bias=bias, weight=weight)) == plain
    last = weight.contiguous(memory_format=torch.channels_last)
    assert last.stride() != weight.stride()
    assert fingerprint({"weight": last, "bias": bias}) == plain
    transposed = weight.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
    assert fingerprint({"weight": transposed.requires_grad_(), "bias": bias}) == plain


@pytest.mark.parametrize(
    "other",
    [
        {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)},
        {"w": torch.tensor([[1.0, 2.0]])},
        {"w": torch.tensor([2.0, 1.0])},
        {"w": torch.tensor([1.0, 2.0 + 2**-22])},
        {"v": torch.tensor([1.0, 2.0])},
        {"w": torch.tensor([1.0, 2.0]), "v": torch.zeros(0)},
        {"w": torch.tensor([1.0])},
    ],
)
def test_it_differs_where_anything_differs(other: dict[str, Tensor]) -> None:
    assert fingerprint(other) != fingerprint({"w": torch.tensor([1.0, 2.0])})


def test_it_tells_the_signs_of_zeros_apart() -> None:
    assert fingerprint({"w": torch.tensor([0.0])}) != fingerprint({"w": torch.tensor([-0.0])})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.uint8, torch.bool, torch.int64])
def test_it_takes_every_dtype(dtype: torch.dtype) -> None:
    assert len(fingerprint({"w": torch.ones(3, dtype=dtype), "scalar": torch.ones((), dtype=dtype)})) == 64
