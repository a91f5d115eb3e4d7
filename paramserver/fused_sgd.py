"""Sum along the tree, mean and SGD of a chunk in one pass over memory, where a C compiler is at hand.

torch does each operation by itself, and reads and writes a chunk again for each: for what a round costs, memory is all
that counts. ``fused_sgd.c`` reads every contribution, parameter and momentum once. Each of its operations is one of
IEEE 754, in the order of torch's, so the bits are the same; that is tried at start. If they are not, or there is no
compiler, torch does the work. The idea of aggregation and optimizer in one pass is PHub's (Luo et al., SoCC 2018).
"""

import ctypes
import hashlib
import itertools
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from paramserver.reduction import Addition, Node, plan_additions

__all__ = ["FusedSgd", "fused_sgd"]

_SOURCE = Path(__file__).with_suffix(".c")
_FLAGS = ("-O2", "-ftree-vectorize", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")
"""No contraction: a product and a sum are rounded one after the other but for those that torch fuses, too."""
_COMPILE_S = 60.0
_CACHE = Path(".cache") / "pushpull"


class _Chunk(ctypes.Structure):
    """``struct chunk`` of fused_sgd.c."""

    _fields_ = (
        ("length", ctypes.c_int64),
        ("num_pushed", ctypes.c_int64),
        ("pushed", ctypes.c_void_p),
        ("num_additions", ctypes.c_int64),
        ("additions", ctypes.c_void_p),
        ("old", ctypes.c_void_p),
        ("new", ctypes.c_void_p),
        ("momentum_old", ctypes.c_void_p),
        ("momentum_new", ctypes.c_void_p),
        ("divisor", ctypes.c_float),
        ("weight_decay", ctypes.c_float),
        ("momentum", ctypes.c_float),
        ("step", ctypes.c_float),
        ("nesterov", ctypes.c_int32),
        ("streaming", ctypes.c_int32),
    )


_Function = Callable[[ctypes.Structure], int]


@dataclass(frozen=True, kw_only=True)
class FusedSgd:
    """The compiled pass; without the interpreter's lock while it works."""

    function: _Function

    def __call__(
        self,
        pushed: Sequence[int],
        additions: tuple[Addition, ...],
        parameters: tuple[Tensor, Tensor],
        momenta: tuple[Tensor | None, Tensor | None],
        *,
        divisor: float,
        lr: float,
        weight_decay: float,
        momentum: float,
        nesterov: bool,
        streaming: bool = True,
    ) -> bool:
        """Write the next version of parameters and momentum; False if the sum is not finite somewhere.

        Args:
            pushed: addresses of the contributions, (n,) fp32 each.
            additions: that make their sum; see ``plan_additions``.
            parameters: (n,) fp32, read and written; both may be the same.
            momenta: likewise; None where there is none yet, or none at all.
            divisor: total weight, exact in fp32.
            lr: learning rate.
            weight_decay: see ``torch.optim.SGD``.
            momentum: likewise.
            nesterov: likewise.
            streaming: whether what is written goes past the caches: for what the next one to read is far away.
        """
        old, new = parameters
        old_momentum, new_momentum = (None if m is None else m.data_ptr() for m in momenta)
        plan = _as_array(additions)
        found = self.function(
            _Chunk(
                old.numel(),
                len(pushed),
                ctypes.addressof(addresses := (ctypes.c_void_p * len(pushed))(*pushed)),
                len(additions),
                ctypes.addressof(plan),
                old.data_ptr(),
                new.data_ptr(),
                old_momentum,
                new_momentum,
                divisor,
                weight_decay,
                momentum,
                -lr,
                nesterov,
                streaming,
            )
        )
        del addresses
        assert found >= 0, "the tree is deeper than the pass has registers"
        return not found


@lru_cache(maxsize=256)
def _as_array(additions: tuple[Addition, ...]) -> "ctypes.Array[ctypes.c_int32]":
    flat = tuple(itertools.chain.from_iterable(additions))
    return (ctypes.c_int32 * max(1, len(flat)))(*flat)


@lru_cache(maxsize=1)
def fused_sgd() -> FusedSgd | None:
    """The pass of this process's machine, or None if there is no compiler or its bits are not torch's."""
    try:
        library = _library()
    except (OSError, RuntimeError, subprocess.SubprocessError):  # RuntimeError: nobody's home
        return None
    function = library.pushpull_fused_sgd
    function.argtypes, function.restype = [ctypes.POINTER(_Chunk)], ctypes.c_int
    fused = FusedSgd(function=function)
    return fused if _has_the_bits_of_torch(fused) else None


def _library() -> ctypes.CDLL:
    """The shared library, compiled once for each machine, user and version of the source.

    Raises:
        OSError, subprocess.SubprocessError: if it cannot be made.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    key = hashlib.sha256(repr((_SOURCE.read_text(), _FLAGS, compiler, platform.machine(), _features())).encode())
    kept = Path.home() / _CACHE / f"fused_sgd-{key.hexdigest()[:16]}.so"
    if kept.is_file() and kept.stat().st_uid == os.getuid():
        return ctypes.CDLL(str(kept))
    try:
        kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder = tempfile.TemporaryDirectory(dir=kept.parent)
    except OSError:  # nothing can be kept there
        folder = tempfile.TemporaryDirectory()
    with folder as own:
        made = Path(own) / kept.name
        command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(made), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=_COMPILE_S, stdin=subprocess.DEVNULL)
        library = ctypes.CDLL(str(made))
        if made.parent.parent == kept.parent:
            made.replace(kept)  # at once: others may be making it, too
    return library


def _features() -> str:
    """What the processor can do: the library is made for that alone."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _has_the_bits_of_torch(fused: FusedSgd) -> bool:
    """Whether it computes what torch computes, on random numbers of a length with a rest, in all its ways."""
    length, lr, momentum, divisor = 333, 0.1, 0.9, torch.tensor(7.0)
    random = torch.Generator().manual_seed(0)
    pushed = [torch.randn(length, generator=random) for _ in range(3)]
    old, before = torch.randn(length, generator=random), torch.randn(length, generator=random)
    additions = plan_additions(Node(0, 3), (Node(0, 1), Node(1, 2), Node(2, 3)))
    total = pushed[0] + pushed[1] + pushed[2]
    for decay, known, nesterov, remembers in itertools.product((0.0, 0.1), (True, False), (True, False), (True, False)):
        gradient = torch.div(total, divisor)
        if decay:
            gradient.add_(old, alpha=decay)
        direction = torch.mul(before, momentum).add_(gradient) if known else gradient.clone()
        moved = gradient.add(direction, alpha=momentum) if nesterov else direction
        wanted = torch.add(old, moved if remembers else gradient, alpha=-lr)
        new, after = torch.empty(length), torch.empty(length)
        finite = fused(
            [vector.data_ptr() for vector in pushed],
            additions,
            (old, new),
            (before if known and remembers else None, after if remembers else None),
            divisor=float(divisor),
            lr=lr,
            weight_decay=decay,
            momentum=momentum,
            nesterov=nesterov,
        )
        if not (finite and torch.equal(new, wanted) and (not remembers or torch.equal(after, direction))):
            return False
    return True
