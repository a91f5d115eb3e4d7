"""Integer and boolean buffers in one block of bytes: a step copies, compares and sends them all at once."""

import ctypes
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
        layout: of another block.
        content: (bytes,) uint8, on the device where the buffers are used; or bytes, of which a tensor is made only if
            somebody looks at a buffer. A step sends and compares blocks without a tensor being made.
    """

    def __init__(self, layout: bytes, content: Tensor | bytes) -> None:
        self.layout = layout
        """What two blocks have in common that hold the same keys: bytes, so that it is compared and sent at once."""
        self._content = content

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
    def of(cls, buffers: Mapping[str, Tensor]) -> "IntegerBlock":
        """``buffers`` themselves if they are a block, else a block with copies of them."""
        return buffers if isinstance(buffers, IntegerBlock) else cls.pack(buffers)

    @property
    def data(self) -> Tensor:
        """All buffers as (bytes,) uint8; not to be written in a block that was sent or snapped."""
        if isinstance(self._content, bytes):
            self._content = torch.frombuffer(bytearray(self._content or b"\0"), dtype=torch.uint8)[: len(self._content)]
        return self._content

    def to_bytes(self) -> bytes:
        """A copy of all buffers."""
        if isinstance(self._content, bytes):
            return self._content
        host = self._content.cpu() if self._content.is_cuda else self._content
        return ctypes.string_at(host.data_ptr(), host.numel())

    def snap(self, *, later: bool = False) -> "IntegerBlock":
        """The buffers as they are now, on the CPU; with ``later`` a GPU's come once it has come here."""
        if later and self.data.is_cuda:
            host = torch.empty(self.data.shape, dtype=torch.uint8, pin_memory=True)
            return IntegerBlock(self.layout, host.copy_(self.data, non_blocking=True))
        return IntegerBlock(self.layout, self.to_bytes())

    def assign(self, other: Mapping[str, Tensor]) -> None:
        """Copy the buffers of ``other`` into this block's."""
        if isinstance(other, IntegerBlock) and other.layout == self.layout and not self.data.is_cuda:
            content = other.to_bytes()
            ctypes.memmove(self.data.data_ptr(), content, len(content))
            return
        if isinstance(other, IntegerBlock) and other.layout == self.layout:
            self.data.copy_(other.data)
            return
        for name, value in other.items():
            self[name].copy_(value)

    def __reduce__(self) -> tuple[object, ...]:
        return IntegerBlock, (self.layout, self.to_bytes())

    def same(self, other: Mapping[str, Tensor]) -> bool:
        """Whether ``other`` is a block of the same keys and the same bytes."""
        return isinstance(other, IntegerBlock) and other.layout == self.layout and other.to_bytes() == self.to_bytes()

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
