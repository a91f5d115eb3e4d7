"""Shared memory without a name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from paramserver.arena import Arena, check_room
from paramserver.errors import ConfigError


def test_two_mappings_show_the_same_memory() -> None:
    arena = Arena.create(10_000)
    other = Arena.attach(os.dup(arena.descriptor))
    arena.tensor(256, 100).fill_(3.0)
    assert torch.equal(other.tensor(256, 100), torch.full((100,), 3.0))
    assert arena.num_bytes == other.num_bytes >= 10_000
    assert other.tensor(0, 8, torch.int64).sum() == 0, "new memory is zero"


def test_tensors_outlive_the_arena_and_its_descriptor() -> None:
    arena = Arena.create(64)
    values = arena.tensor(0, 16)
    values.fill_(2.0)
    arena.close()
    del arena
    assert values.sum() == 32


def test_it_has_no_name(tmp_path: Path) -> None:
    arena = Arena.create(1 << 20, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert os.fstat(arena.descriptor).st_nlink == 0


def test_it_is_gone_with_a_process_that_was_killed() -> None:
    code = "import os, signal; from paramserver.arena import Arena; a = Arena.create(1 << 22); " + (
        "a.tensor(0, 1 << 20).fill_(1.0); os.kill(os.getpid(), signal.SIGKILL)"
    )
    before = {path.name for path in Path("/dev/shm").iterdir()}
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -9
    assert {path.name for path in Path("/dev/shm").iterdir()} <= before


@pytest.mark.parametrize(("offset", "numel"), [(-4, 1), (4096, 1), (0, 1025), (2, 1)])
def test_what_does_not_lie_inside_is_refused(offset: int, numel: int) -> None:
    arena = Arena.create(4096)
    with pytest.raises(ValueError, match="are not in an arena of 4096"):
        arena.tensor(offset, numel)


def test_a_full_file_system_is_named_with_the_size_that_is_wanted() -> None:
    free = os.statvfs("/dev/shm").f_bavail * os.statvfs("/dev/shm").f_frsize
    size = free + (1 << 30)
    with pytest.raises(ConfigError, match=rf"/dev/shm has no room for {size >> 20}\d* MiB .*--arena-dir"):
        Arena.create(size // (1 << 20) * (1 << 20))


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--arena-dir .*/gone cannot hold shared memory: No such file"):
        Arena.create(1, tmp_path / "gone")


def test_room_is_checked_before_anything_is_made(tmp_path: Path) -> None:
    check_room(tmp_path, 1)
    with pytest.raises(ConfigError, match=r"has no room for 1099511627776 MiB of shared memory.*--arena-dir"):
        check_room(tmp_path, 1 << 60)
    with pytest.raises(ConfigError, match=r"--arena-dir .*/gone cannot hold shared memory"):
        check_room(tmp_path / "gone", 1)
