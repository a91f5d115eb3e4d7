"""Integer and boolean buffers in one block of bytes: a step copies, compares and sends them all at once."""

import math
import pickle
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["IntegerBlock"]

_ALIGNMENT = 8


class _Field(NamedTuple):
    """Where one buffer lies."""

    offset: int
    """In bytes."""
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class IntegerBlock(Mapping[str, Tensor]):
    """A mapping of buffers by key whose tensors are views of one block.

    Args:
        layout: of another block, or ``describe``d.
        data: (bytes,) uint8, on the device where the buffers are used.
    """

    def __init__(self, layout: bytes, data: Tensor) -> None:
        self.layout = layout
        """What two blocks have in common that hold the same keys: bytes, so that it is compared and sent at once."""
        self.data = data

    @classmethod
    def pack(cls, buffers: Mapping[str, Tensor], device: torch.device | None = None) -> "IntegerBlock":
        """A block with copies of ``buffers``, which may be a block themselves."""
        if isinstance(buffers, IntegerBlock):
            return cls(buffers.layout, buffers.data.to(device or buffers.data.device, copy=True))
        fields: dict[str, _Field] = {}
        end = 0
        for name in sorted(buffers):
            fields[name] = _Field(end, buffers[name].dtype, tuple(buffers[name].shape))
            end += -(-fields[name].num_bytes // _ALIGNMENT) * _ALIGNMENT
        block = cls(pickle.dumps(fields, protocol=4), torch.zeros(end, dtype=torch.uint8, device=device))
        for name, value in buffers.items():
            block[name].copy_(value)
        return block

    @classmethod
    def _received(cls, layout: bytes, data: bytes) -> "IntegerBlock":
        return cls(layout, torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0).byte())

    def __reduce__(self) -> tuple[object, ...]:
        return IntegerBlock._received, (self.layout, self.data.numpy(force=True).tobytes())

    def same(self, other: Mapping[str, Tensor]) -> bool:
        """Whether ``other`` is a block of the same keys and the same bytes."""
        return isinstance(other, IntegerBlock) and other.layout == self.layout and torch.equal(other.data, self.data)

    def updated(self, other: Mapping[str, Tensor]) -> "IntegerBlock":
        """These buffers, those of ``other`` in place of the ones it has; not copied where it has them all."""
        if not other or self.same(other):
            return self
        if isinstance(other, IntegerBlock) and (not self or other.layout == self.layout):
            return other
        return IntegerBlock.pack({**self, **other})

    def __getitem__(self, name: str) -> Tensor:
        field = _fields(self.layout)[name]
        part = self.data[field.offset : field.offset + field.num_bytes]
        return part.view(field.dtype).view(field.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(_fields(self.layout))

    def __len__(self) -> int:
        return len(_fields(self.layout))


@lru_cache(maxsize=64)
def _fields(layout: bytes) -> dict[str, _Field]:
    fields: dict[str, _Field] = pickle.loads(layout)
    return fields
