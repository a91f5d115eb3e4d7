"""A device's copy of the model: its parameters lie in one flat vector, its gradients are taken out into another."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from paramserver.config import OptimizerConfig, ServerConfig
from paramserver.errors import ConfigError, ReplicaMismatch
from paramserver.integers import IntegerBlock
from paramserver.partition import BUFFERS, Key, KeySpec, Partition, make_partition
from paramserver.state import State
from workers.compiled import uncompiled

__all__ = ["Replica", "agree", "describe_model", "freeze_batch_norm"]

_FROZEN = "pushpull_frozen"
"""Attribute of a module that stays in evaluation mode."""


def freeze_batch_norm(model: nn.Module) -> None:
    """Let all batch norms keep their statistics, scale and shift, in training too."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.requires_grad_(False)
            setattr(module, _FROZEN, True)


def _train(model: nn.Module) -> None:
    model.train()
    for module in model.modules():
        if getattr(module, _FROZEN, False):
            module.eval()


def describe_model(model: nn.Module, optimizer: OptimizerConfig, servers: ServerConfig) -> tuple[Partition, State]:
    """Partition and initial state of a model; freezes the keys that the optimizer's patterns name.

    The model must have its final memory format. Keys are laid out in reverse order of ``named_parameters``: about the
    order in which backward produces them.

    Raises:
        ConfigError: if a pattern fits no key, a key is not fp32, or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    optimizer.check_patterns(list(parameters))
    for name, parameter in parameters.items():
        if optimizer.is_frozen(name):
            parameter.requires_grad_(False)
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    if not trained:
        raise ConfigError("every parameter is frozen: nothing is left to train")
    persistent = model.state_dict(keep_vars=True)
    for name, value in persistent.items():
        if isinstance(value, nn.Parameter) and name not in parameters:
            raise ConfigError(f"{name!r} is the same tensor as another parameter: tied parameters are not supported")
    buffers = {name: value for name, value in model.named_buffers() if name in persistent}
    floats = {name: value for name, value in buffers.items() if value.is_floating_point()}
    for name, value in {**trained, **floats}.items():
        if value.dtype != torch.float32:
            raise ConfigError(f"{name!r} is {value.dtype}: parameters and float buffers must be float32")
    factors = sorted({optimizer.lr_factor(name) for name in trained})
    specs = [_spec(name, value, factors.index(optimizer.lr_factor(name))) for name, value in reversed(trained.items())]
    specs += [_spec(name, value, BUFFERS) for name, value in floats.items()]
    copies = {name: value.detach().cpu().clone() for name, value in persistent.items()}
    state = State(
        version=0,
        values={name: copies[name] for name in (*trained, *floats)},
        integers={name: copies[name] for name in buffers if name not in floats},
        constants={name: copies[name] for name in parameters if name not in trained},
    )
    return make_partition(specs, servers), state


def _spec(name: str, value: Tensor, group: int) -> KeySpec:
    dense = value.is_contiguous() or (value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last))
    if not dense:
        raise ConfigError(f"{name!r} is neither contiguous nor channels-last: make it so in build_model")
    return KeySpec(name, tuple(value.shape), tuple(value.stride()), group)


def agree(known: Mapping[str, Tensor], found: IntegerBlock) -> IntegerBlock:
    """Integer buffers after a microbatch, which must be ``known``: those after another one of the step, or empty.

    Raises:
        ReplicaMismatch: naming the buffer that differs.
    """
    if not found.same(known):
        for name, value in known.items():
            if not torch.equal(value, found[name]):
                raise ReplicaMismatch(
                    f"buffer {name!r} differs between microbatches of one step ({value} and {found[name]}): "
                    "an integer buffer must become the same in every microbatch"
                )
    return found


_KEPT_VIEWS = 2
"""Both versions of an arena: what the replica was made with is given back then."""


class _Views(NamedTuple):
    """A flat vector, kept so that its address stays its own, and the parameters' views of it."""

    flat: Tensor
    parameters: list[Tensor]


class Replica:
    """A model whose parameters are views of one flat fp32 vector.

    Args:
        model: on its device, in its final memory format.
        partition: of this model.
    """

    def __init__(self, model: nn.Module, partition: Partition) -> None:
        self.model = model
        self.partition = partition
        self.device = next(model.parameters()).device
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        self._parameters = [(key, parameters[key.name]) for key in partition.keys if key.group != BUFFERS]
        self._buffers = [(key, buffers[key.name]) for key in partition.keys if key.group == BUFFERS]
        held = {key.name for key in partition.keys}
        persistent = model.state_dict(keep_vars=True)
        integers = {name: buffers[name] for name in buffers if name in persistent and name not in held}
        # The model's own buffers, in two blocks: a microbatch puts them back by two copies, however many they are.
        self._integers = IntegerBlock.pack(integers, self.device)
        self._pulled_integers = IntegerBlock.pack(self._integers)
        for name, buffer in integers.items():
            buffer.data = self._integers[name]
        self._first_buffer = self._buffers[0][0].offset if self._buffers else partition.length
        self._private = torch.zeros(partition.length - self._first_buffer, device=self.device)
        self._constants = {name: value for name, value in parameters.items() if name not in held}
        self._known_views: dict[int, _Views] = {}
        self._pointed_to: Tensor | None = None
        self._ahead: set[int] = set()
        """Parameters that point to ``_ahead_in`` already."""
        self._ahead_in: Tensor | None = None
        self.values = torch.zeros(partition.length, device=self.device)
        """The pulled version, as a flat (length,) vector."""
        for key, parameter in self._parameters:
            key.view(self.values).copy_(parameter.detach())
        for key, buffer in self._buffers:
            key.view(self.values).copy_(buffer)
            buffer.data = self._private.as_strided(key.shape, key.stride, key.offset - self._first_buffer)
        self.point_to(self.values)
        self.reset_buffers()
        _train(model)

    def point_to(self, flat: Tensor) -> None:
        """Make a flat (length,) vector on this device the parameters, without copying.

        Must not happen between forward and backward: autograd would silently read the new values.
        """
        if flat is self._pointed_to and not self._ahead:
            return
        there = self._ahead if flat is self._ahead_in else set()
        self.values = self._pointed_to = flat
        if len(there) < len(self._parameters):
            for index, view in enumerate(self._views(flat).parameters):
                if index not in there:
                    self._parameters[index][1].data = view
        self._ahead, self._ahead_in = set(), None

    def point_ahead(self, index: int, flat: Tensor) -> None:
        """As ``point_to`` for one parameter whose gradient backward has just made: it is in cache, and read no more.

        ``point_to`` must follow before the next forward pass, with the same vector unless the step is given up.
        """
        if flat is not self._ahead_in:
            self._ahead, self._ahead_in = set(), flat
        self._ahead.add(index)
        self._parameters[index][1].data = self._views(flat).parameters[index]

    def let_go(self) -> None:
        """Hold nobody else's memory any more; what ``values`` holds then counts for nothing."""
        if self.device.type == "cpu":
            self._known_views.clear()
            self.point_to(torch.empty(self.partition.length))

    def _views(self, flat: Tensor) -> "_Views":
        """The keys' views of a vector; those of the last few are kept, since a run has only a few vectors."""
        found = self._known_views.get(flat.data_ptr())
        if found is None:
            if len(self._known_views) >= _KEPT_VIEWS:
                self._known_views.pop(next(iter(self._known_views)))
            found = _Views(flat, [key.view(flat) for key, _ in self._parameters])
            self._known_views[flat.data_ptr()] = found
        return found

    def load(self, integers: Mapping[str, Tensor], constants: Mapping[str, Tensor] | None = None) -> None:
        """Take integer buffers (and frozen keys) of the version that now lies in ``values``.

        The model sees them from the next ``reset_buffers`` on.
        """
        if integers:
            self._pulled_integers.assign(integers)
        for name, value in (constants or {}).items():
            with torch.no_grad():
                self._constants[name].copy_(value)

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Give the model private copies of the pulled buffers: every microbatch starts from them (E4)."""
        if self._buffers:
            self._private.copy_(self.buffer_part(self.values))
        if self._integers:
            self._integers.data.copy_(self._pulled_integers.data)

    @property
    def parameters(self) -> Sequence[tuple[Key, nn.Parameter]]:
        """The trained parameters with their places, in the order of the flat vector."""
        return self._parameters

    @torch.no_grad()
    def take_gradients(self, out: Tensor) -> None:
        """Write the gradients into the parameters' part of ``out`` (length,) and drop them."""
        for key, parameter in self._parameters:
            view = key.view(out)
            if parameter.grad is None:
                view.zero_()
            else:
                view.copy_(parameter.grad)
                parameter.grad = None

    @torch.no_grad()
    def take_buffer_changes(self, change: Tensor, samples: int) -> None:
        """Write samples x (after - pulled) into ``change``, which has the size of ``buffer_part``."""
        pulled = self.buffer_part(self.values)
        torch.sub(self._private, pulled, out=change).mul_(samples)
        # An infinity that nobody touched: inf - inf is no number.
        change.masked_fill_(self._private == pulled, 0.0)

    @property
    def has_buffers(self) -> bool:
        """Whether the model has float buffers."""
        return bool(self._buffers)

    def new_buffer_part(self) -> Tensor:
        """Zeros of the size of ``buffer_part``."""
        return torch.zeros_like(self._private)

    def buffer_part(self, flat: Tensor) -> Tensor:
        """The part of a flat (length,) vector where the float buffers lie: they come last."""
        return flat[self._first_buffer :]

    @property
    def integer_buffers(self) -> Mapping[str, Tensor]:
        """The model's integer and boolean buffers, by key."""
        return self._integers

    def integers(self, *, later: bool = False) -> IntegerBlock:
        """Copies of the integer and boolean buffers as the last microbatch left them, on the CPU.

        With ``later`` they are only on their way: whoever reads them waits for the device first.
        """
        return self._integers.snap(later=later)

    def keep_integers(self) -> None:
        """Those that the last microbatch left are the next version's: microbatches start from them."""
        if self._integers:
            self._pulled_integers.data.copy_(self._integers.data)

    def agreed_integers(self, known: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """As ``integers``, which must be ``known``: see ``agree``."""
        return agree(known, self.integers())

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The model with the pulled buffers, in evaluation mode and without gradients."""
        self.reset_buffers()
        self.model.eval()
        try:
            with uncompiled(), torch.no_grad():  # inference mode would poison what tasks cache, anchors for instance
                yield self.model
        finally:
            _train(self.model)
