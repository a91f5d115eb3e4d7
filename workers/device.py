"""Making a process compute as one device of the run, the same way on every backend."""

import contextlib
import ctypes
import os
import platform
import sys

import torch

from paramserver.errors import ConfigError
from workers.config import DeviceKind, WorkerConfig

__all__ = [
    "cpu_model",
    "device_kind",
    "keep_freed_memory",
    "launches_block",
    "quiet_profiler",
    "setup_device",
    "tune_cpu_process",
    "update_threads",
]

_MOST_UPDATE_THREADS = 8
"""Of one server: a few cores can use all of the memory's bandwidth."""
_SWITCH_S = 1e-4
"""After which a thread that computes in Python lets another one go on: those that hand on what a GPU has made would
otherwise wait for 5 ms, a tenth of a step, whenever the one that launches kernels does something else."""

# As malloc.h has them.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -3, -4, -8


def setup_device(config: WorkerConfig) -> torch.device:
    """Pin threads, choose reproducible kernels, and return the device.

    Whoever computes on it says ``keep_freed_memory`` once all is there that outlives a step.

    Raises:
        ConfigError: if a GPU is wanted that is not there.
    """
    torch.set_num_threads(config.threads)
    if config.device == "cpu":
        _let_others_go_first()
        _set_large_blocks_apart()
        return torch.device("cpu")
    if config.device_index >= torch.cuda.device_count():
        raise ConfigError(
            f"worker {config.worker} wants GPU {config.device_index}, but {torch.cuda.device_count()} are visible: "
            "lower --workers, or set --share-device"
        )
    _choose_reproducible_kernels()
    sys.setswitchinterval(_SWITCH_S)
    device = torch.device("cuda", config.device_index)
    torch.cuda.set_device(device)
    return device


def update_threads(device: DeviceKind, owners: int) -> int:
    """Threads that each of a run's ``owners`` of parameters may update with, where workers use GPUs.

    Where workers compute on the cores, one does: the others compute, or wait on a core each.
    """
    if device == "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MOST_UPDATE_THREADS, cores // (2 * owners)))


def _choose_reproducible_kernels() -> None:
    """CUDA's: those that give the same bits each time. A model that needs one there is none of is warned of by name."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True, warn_only=True)
    # It would cost a pass over memory whose content nobody reads.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False  # it would choose kernels by a race
    torch.backends.cudnn.deterministic = True


def launches_block() -> bool:
    """Whether CUDA was asked to wait for each kernel, as one does who looks for a fault: nothing can be queued then."""
    return os.environ.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0")


def quiet_profiler() -> None:
    """torch.profiler would say on standard error that it begins, and on a CPU that there is no GPU."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def tune_cpu_process() -> None:
    """What a process wants of the system that computes on CPU cores, step after step from now on."""
    _let_others_go_first()
    keep_freed_memory(torch.device("cpu"))


def keep_freed_memory(device: torch.device) -> None:
    """Where ``device`` is the CPU, let malloc keep what a step frees for the next one.

    By default glibc gives large blocks back to the system at once, and the next step pays for a page fault every
    4 KiB: a tenth of FCN's step on one core, and more where several processes wait for the kernel.

    Say it after a first step. Such a step leaves thousands of small blocks (kernels, descriptors) that stay for good;
    glibc cuts 112 bytes too much off for a tensor, whose address it rounds up, and then fills these scraps with small
    blocks. With one of them on each side, a freed block is a few bytes too small for the next tensor of its size, and
    never becomes part of a larger one: the heap grows to twice what is in use.
    """
    if device.type == "cpu":
        _mallopt(
            (_M_TRIM_THRESHOLD, 2**31 - 1),
            (_M_TOP_PAD, 256 << 20),
            (_M_ARENA_MAX, 1),  # those of other threads give memory back whatever one says
            (_M_MMAP_MAX, 0),  # a threshold would be 32 MiB at most, and activations are larger
        )


def _set_large_blocks_apart() -> None:
    """Have them mapped by themselves for now, so that small blocks which stay lie side by side."""
    _mallopt(
        (_M_ARENA_MAX, 1),
        (_M_MMAP_THRESHOLD, 128 << 10),  # the default, which would otherwise rise with every block that is freed
    )


def _mallopt(*options: tuple[int, int]) -> None:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    for option, value in options:
        mallopt(option, value)


def _let_others_go_first() -> None:
    """Wake up without taking a core from whoever runs there.

    A server that tells its workers of a commit would otherwise be put aside by the first of them, with the others still
    waiting to be told (sched(7), SCHED_BATCH; the share of the processor stays the same).
    """
    with contextlib.suppress(OSError, AttributeError):  # not Linux, or not allowed
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def device_kind(config: WorkerConfig) -> dict[str, str | int | bool]:
    """What must be equal on all devices of a run for equal bits: model, instruction set, libraries, threads."""
    kind: dict[str, str | int | bool] = {
        "device": config.device,
        "torch": torch.__version__,
        "threads": config.threads,
        "channels_last": config.channels_last,
        "precision": config.precision,
        "compile": config.compile,
        "mkldnn": bool(torch.backends.mkldnn.is_available()),  # type: ignore[no-untyped-call]
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu": cpu_model(),
    }
    if config.device == "cuda":
        kind["gpu"] = torch.cuda.get_device_name(config.device_index)
        kind["cuda"] = str(torch.version.cuda)
    return kind


def cpu_model() -> str:
    """Name of the processor."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor()
