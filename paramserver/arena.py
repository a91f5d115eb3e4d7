"""Memory that several processes of one machine share: a file without a name, which is gone with its last user.

The file is made with ``O_TMPFILE``, so no process has to clean up after another one that was killed. It travels as a
file descriptor over a Unix socket (``SCM_RIGHTS``), and its pages are reserved before anybody maps them: writing to a
mapping on a full tmpfs would end the process with SIGBUS and no message.
"""

import errno
import mmap
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from paramserver.errors import ConfigError

__all__ = ["DEFAULT_ARENA_DIR", "Arena", "check_room", "round_to_pages"]

DEFAULT_ARENA_DIR = Path("/dev/shm")
_MIB = 1 << 20
_POPULATE = getattr(mmap, "MAP_POPULATE", 0)


def round_to_pages(num_bytes: int) -> int:
    """The next multiple of the page size, at least one page."""
    return max(1, -(-num_bytes // mmap.PAGESIZE)) * mmap.PAGESIZE


class Arena:
    """A mapped piece of shared memory; ``create`` makes one, ``attach`` maps another process's.

    Args:
        descriptor: of the file; owned by this object from now on.
        num_bytes: its size.
    """

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        self.descriptor = descriptor
        self.num_bytes = num_bytes
        # Populated at once: otherwise the first step pays for a page fault every 4 KiB.
        self._map = mmap.mmap(descriptor, num_bytes, flags=mmap.MAP_SHARED | _POPULATE)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    @classmethod
    def create(cls, num_bytes: int, folder: Path = DEFAULT_ARENA_DIR) -> "Arena":
        """A new zeroed arena of at least ``num_bytes`` in a file system that holds ``folder``.

        Raises:
            ConfigError: if there is no room, with the size that is wanted.
        """
        size = round_to_pages(num_bytes)
        try:
            descriptor = _unnamed_file(folder)
        except OSError as error:
            raise ConfigError(f"--arena-dir {folder} cannot hold shared memory: {error.strerror}") from error
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            os.close(descriptor)
            if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT):
                raise
            raise _no_room(folder, size) from error
        return cls(descriptor, size)

    @classmethod
    def attach(cls, descriptor: int) -> "Arena":
        """Map an arena that came over a socket; takes the descriptor over."""
        return cls(descriptor, os.fstat(descriptor).st_size)

    def tensor(self, offset: int, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A (numel,) view of the bytes from ``offset`` on, which keeps the mapping alive."""
        end = offset + numel * dtype.itemsize
        if offset < 0 or end > self.num_bytes or offset % dtype.itemsize:
            raise ValueError(f"bytes {offset} to {end} are not in an arena of {self.num_bytes}")
        return self._bytes[offset:end].view(dtype)

    def words(self, count: int) -> "memoryview[int]":
        """The first ``count`` 64-bit integers; quicker to read and write one by one than a tensor's."""
        return memoryview(self._map)[: 8 * count].cast("q")

    def close(self) -> None:
        """Give the descriptor back; the mapping goes with the last tensor on it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __del__(self) -> None:
        self.close()


def check_room(folder: Path, num_bytes: int) -> None:
    """See whether arenas of ``num_bytes`` in all would find room in ``folder`` now.

    Raises:
        ConfigError: if not, with the size that is wanted.
    """
    try:
        stat = os.statvfs(folder)
    except OSError as error:
        raise ConfigError(f"--arena-dir {folder} cannot hold shared memory: {error.strerror}") from error
    if stat.f_bavail * stat.f_frsize < num_bytes:
        raise _no_room(folder, num_bytes)


def _no_room(folder: Path, num_bytes: int) -> ConfigError:
    return ConfigError(
        f"{folder} has no room for {-(-num_bytes // _MIB)} MiB of shared memory: make it larger "
        "(docker: --shm-size), or name another folder with --arena-dir"
    )


def _unnamed_file(folder: Path) -> int:
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        # What file systems and kernels say that do not know it.
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    descriptor, name = tempfile.mkstemp(prefix="pushpull-arena-", dir=folder)
    os.unlink(name)
    return descriptor
