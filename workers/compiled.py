"""``torch.compile`` for training: kernels that depend on shapes alone, so that all processes make the same ones."""

import contextlib
import shutil
from collections.abc import Iterator

import torch
from torch import nn

from paramserver.errors import ConfigError

__all__ = ["check_compiler", "compile_model", "uncompiled"]

_MAX_SHAPES = 64
"""Of a model's inputs: short minibatches have a shape of their own."""


def check_compiler(device_type: str) -> None:
    """See that what ``torch.compile`` calls is there.

    Raises:
        ConfigError: if it is not.
    """
    if device_type != "cpu":
        return
    from torch._inductor import config  # what it takes, by CXX or by itself

    compilers = [name for name in config.cpp.cxx if name]
    if not any(map(shutil.which, compilers)):
        names = " or ".join(compilers)
        raise ConfigError(f"--compile needs a C++ compiler, and there is no {names}: install it, or leave it out")


def compile_model(model: nn.Module) -> None:
    """Compile a model in place; its keys stay what they are."""
    # By default a second shape would give kernels for all shapes, which are slower, and other ones in a process that
    # has met the shapes in another order: bits would differ.
    torch._dynamo.config.recompile_limit = _MAX_SHAPES
    model.compile(dynamic=False)


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Run models as they were written: an evaluation may have as many shapes as images."""
    with torch.compiler.set_stance("force_eager"):
        yield
