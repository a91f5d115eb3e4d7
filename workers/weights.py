"""Weights from a file, to start from: read without unpickling, and put wherever they fit."""

import pickle
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from paramserver.errors import ConfigError
from paramserver.state import State

__all__ = ["Fitted", "fit_weights", "read_weights", "with_weights"]

_WRAPPERS = ("model", "state_dict", "model_state_dict")
"""Under which training scripts save a model's weights beside other things."""


class Fitted(NamedTuple):
    """What a file has for a model."""

    values: dict[str, Tensor]
    """By the model's keys, in their shapes."""
    missing: list[str]
    """Keys of the model that the file does not have: they keep their initial values."""
    reshaped: list[str]
    """Keys that the file has in another shape, such as the head of another number of classes; likewise."""
    unused: list[str]
    """Keys of the file that the model does not have."""

    def describe(self) -> str:
        """In one line."""
        parts = [f"{len(self.values)} keys fit"]
        for text, names in (
            ("not in it, so at their initial values", self.missing),
            ("of another shape, so at their initial values", self.reshaped),
            ("without a place in the model", self.unused),
        ):
            if names:
                shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
                parts.append(f"{len(names)} {text}: {shown}")
        return "; ".join(parts)


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a safetensors file or from one of ``torch.save``, which is never unpickled.

    Raises:
        ConfigError: if the file is missing, broken, or holds no state dict.
    """
    if path.is_dir():
        raise ConfigError(f"--weights {path} is a folder: name a file, such as checkpoints/step_N/model.safetensors")
    if not path.is_file():
        raise ConfigError(
            f"--weights {path}: no such file; torchvision's have names, such as ResNet18_Weights.IMAGENET1K_V1, and "
            "--download fetches them"
        )
    try:
        if path.suffix == ".safetensors":
            found: Any = safetensors.torch.load_file(path)
        else:
            with warnings.catch_warnings(action="ignore"):  # torch's, of old and foreign formats
                found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a foreign or torn file makes a parser raise
        if isinstance(error, pickle.UnpicklingError) and "Unsupported operand" not in str(error):  # not even a pickle
            raise ConfigError(
                f"--weights {path} holds more than tensors, and is not unpickled: save model.state_dict()"
            ) from error
        said = ": ".join(part for part in (type(error).__name__, *str(error).splitlines()[:1]) if part)
        raise ConfigError(
            f"--weights {path} cannot be read ({said}): it must be a state dict in a safetensors file or one of "
            "torch.save"
        ) from error
    for name in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ConfigError(f"--weights {path} holds no state dict: save model.state_dict()")
    for key, value in found.items():
        if value.is_meta or value.layout is not torch.strided:
            raise ConfigError(f"--weights {path}: {key} is no plain tensor: save model.state_dict() of a dense model")
    # What DataParallel and torch.compile write in front.
    return {str(key).removeprefix("module.").removeprefix("_orig_mod."): value for key, value in found.items()}


def fit_weights(
    own: Mapping[str, Tensor], stored: Mapping[str, Tensor], aliases: Mapping[str, str] | None = None
) -> Fitted:
    """Match the keys of a file with a model's.

    The file may be of a part of the model, such as its backbone: then the one prefix is taken under which most keys
    fit. A tensor of as many elements in another shape, under an alias, is a linear layer written as a convolution.

    Args:
        own: the model's state dict.
        stored: the file's.
        aliases: what modules of the file are called in the model.
    """
    renamed = {_renamed(key, aliases or {}): key for key in stored}
    prefix = _best_prefix(own, {key: stored[old] for key, old in renamed.items()})
    values: dict[str, Tensor] = {}
    reshaped: list[str] = []
    unused: list[str] = []
    for key, old in renamed.items():
        place, value = prefix + key, stored[old]
        if place not in own:
            unused.append(old)
        elif own[place].shape == value.shape or (key != old and own[place].numel() == value.numel()):
            values[place] = value.detach().to(own[place].dtype).reshape(own[place].shape).clone()
        else:
            reshaped.append(place)
    missing = [key for key in own if key not in values and key not in reshaped]
    return Fitted(values, missing, reshaped, unused)


def _renamed(key: str, aliases: Mapping[str, str]) -> str:
    module, _, leaf = key.rpartition(".")
    return f"{aliases[module]}.{leaf}" if module in aliases else key


def _best_prefix(own: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> str:
    counts = {"": 0}
    for name, mine in own.items():
        parts = name.split(".")
        for depth in range(len(parts)):
            found = stored.get(".".join(parts[depth:]))
            if found is not None and found.numel() == mine.numel():
                prefix = "".join(f"{part}." for part in parts[:depth])
                counts[prefix] = counts.get(prefix, 0) + 1
    return max(counts, key=lambda prefix: (counts[prefix], -len(prefix)))


def with_weights(state: State, fitted: Fitted) -> State:
    """The initial state with whatever a file has."""

    def taken(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: fitted.values.get(key, value) for key, value in part.items()}

    parts = (state.values, state.integers, state.constants)
    values, integers, constants = (taken(part) for part in parts)
    return replace(state, values=values, integers=integers, constants=constants)
