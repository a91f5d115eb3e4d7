"""Passes over memory that are written in C: compiled with whatever compiler is at hand, kept, and called by ctypes.

torch does each operation by itself, and reads and writes a chunk again for each: for what a round costs, memory is all
that counts. Each operation of a pass is one of IEEE 754 (or a function of torch's own), in the order of torch's, so
the bits are the same; each pass tries that when it is first wanted, and if they are not, or there is no compiler, torch
does the work. The idea of aggregation and optimizer in one pass is PHub's (Luo et al., SoCC 2018).
"""

import contextlib
import ctypes
import hashlib
import itertools
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

from paramserver.reduction import Addition

__all__ = [
    "DIVISOR_OFFSET",
    "Pass",
    "PassUnavailable",
    "Sum",
    "Work",
    "WorkStruct",
    "load_library",
    "load_pass",
    "sum_of",
]

_FOLDER = Path(__file__).parent
_HEADERS = tuple(_FOLDER / name for name in ("fused.h", "fused_work.h", "work.h"))
_REGISTERS = 32
"""For sums inside the tree: as many as it is deep."""
_FLAGS = (
    f"-DREGISTERS={_REGISTERS}",
    "-O2",
    "-ftree-vectorize",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-shared",
    "-fPIC",
    "-pthread",
)
"""No contraction: a product and a sum are rounded one after the other but for those that torch fuses, too."""
_COMPILE_S = 60.0
_CACHE = Path(".cache") / "pushpull"
_KEPT_S = 30 * 86400.0

Pass = Callable[["WorkStruct"], None]
"""``pushpull_work`` of a pass; it runs without the interpreter's lock."""


class PassUnavailable(Exception):
    """There is no compiler, or it does not compile."""


class WorkStruct(ctypes.Structure):
    """``struct work`` of work.h."""

    _fields_ = (
        ("chunks", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("next", ctypes.c_int64),
        ("found", ctypes.c_int64),
    )


class Work:
    """Chunks for a pass, done once they were called for by any number of threads: each call takes a share and returns.

    Args:
        function: the pass.
        chunks: a ``struct chunk`` of its kind each; not to be changed meanwhile.
    """

    def __init__(self, function: Pass, chunks: Sequence[ctypes.Structure]) -> None:
        addresses = (ctypes.c_void_p * len(chunks))(*map(ctypes.addressof, chunks))
        self._kept = chunks, addresses  # the structure has their addresses alone
        self._work = WorkStruct(ctypes.addressof(addresses), len(chunks), 0, 0)
        self._function = function

    def __call__(self) -> None:
        """Take a share, until nothing is left to take; others may still be busy with theirs then."""
        self._function(self._work)

    @property
    def finite(self) -> bool:
        """Whether all sums are finite everywhere; once every call has returned."""
        return not self._work.found


class Sum(ctypes.Structure):
    """``struct sum`` of fused.h."""

    _fields_ = (
        ("length", ctypes.c_int64),
        ("num_pushed", ctypes.c_int64),
        ("pushed", ctypes.c_void_p),
        ("num_additions", ctypes.c_int64),
        ("additions", ctypes.c_void_p),
        ("divisor", ctypes.c_float),
        ("streaming", ctypes.c_int32),
    )


DIVISOR_OFFSET = Sum.divisor.offset
"""Where a chunk of any pass has its divisor: each begins with its sum."""


def sum_of(
    length: int, pushed: Sequence[int], additions: tuple[Addition, ...], divisor: float, *, streaming: bool
) -> Sum:
    """What a pass begins with; to be kept until it is over.

    Args:
        length: elements of the chunk.
        pushed: addresses of the contributions, (length,) fp32 each.
        additions: that make their sum; see ``plan_additions``.
        divisor: of the sum, exact in fp32.
        streaming: whether what is written goes past the caches: for what the next one to read is far away.
    """
    depth = max((addition.target for addition in additions), default=0) - len(pushed)
    assert depth < _REGISTERS, "the tree is deeper than a pass has registers"
    addresses = (ctypes.c_void_p * len(pushed))(*pushed)
    plan = _as_array(additions)
    made = Sum(
        length, len(pushed), ctypes.addressof(addresses), len(additions), ctypes.addressof(plan), divisor, streaming
    )
    made.kept = addresses, plan  # the structure has their addresses alone
    return made


@lru_cache(maxsize=256)
def _as_array(additions: tuple[Addition, ...]) -> "ctypes.Array[ctypes.c_int32]":
    flat = tuple(itertools.chain.from_iterable(additions))
    return (ctypes.c_int32 * max(1, len(flat)))(*flat)


def load_pass(name: str, folder: Path = _FOLDER) -> Pass:
    """The pass of ``NAME.c``.

    Args:
        name: of the pass.
        folder: where the source lies.

    Raises:
        PassUnavailable: if it cannot be compiled here.
    """
    function = load_library(folder / f"{name}.c").pushpull_work
    function.argtypes, function.restype = [ctypes.POINTER(WorkStruct)], None
    found: Pass = function
    return found


def load_library(source: Path) -> ctypes.CDLL:
    """What is compiled of a source that may include the headers of this folder.

    Raises:
        PassUnavailable: if it cannot be compiled here.
    """
    try:
        return _library(source)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: nobody's home
        raise PassUnavailable(str(error)) from error


def _library(source: Path) -> ctypes.CDLL:
    """The shared library, compiled once for each machine, user and version of the source.

    Raises:
        OSError, subprocess.SubprocessError: if it cannot be made.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    about = (
        source.read_text(),
        *(header.read_text() for header in _HEADERS),
        _FLAGS,
        compiler,
        platform.machine(),
        _features(),
    )
    key = hashlib.sha256(repr(about).encode())
    kept = Path.home() / _CACHE / f"{source.stem}-{key.hexdigest()[:16]}.so"
    if kept.is_file() and kept.stat().st_uid == os.getuid():
        with contextlib.suppress(OSError):
            os.utime(kept)
        return ctypes.CDLL(str(kept))
    try:
        kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder = tempfile.TemporaryDirectory(dir=kept.parent)
    except OSError:  # nothing can be kept there
        folder = tempfile.TemporaryDirectory()
    with folder as own:
        made = Path(own) / kept.name
        command = [compiler, *_FLAGS, f"-I{_FOLDER}", str(source), "-o", str(made), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=_COMPILE_S, stdin=subprocess.DEVNULL)
        library = ctypes.CDLL(str(made))
        if made.parent.parent == kept.parent:
            made.replace(kept)  # at once: others may be making it, too
            _sweep(kept.parent)
    return library


def _sweep(folder: Path) -> None:
    """Take away what nobody has used for a month: libraries of older versions, and what a killed compiler has left."""
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < time.time() - _KEPT_S:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _features() -> str:
    """What the processor can do: the library is made for that alone."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
