"""What processes hold of the machine's memory."""

import re
from collections.abc import Iterable
from pathlib import Path

__all__ = ["arena_bytes", "unshared_mib"]


def unshared_mib(pid: int) -> float:
    """MiB that no other process has mapped (USS)."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(kib) for kib in re.findall(r"^Private_(?:Clean|Dirty):\s+(\d+)", text, re.MULTILINE)) / 1024


def arena_bytes(pids: Iterable[int]) -> int:
    """Bytes of the files without a name in /dev/shm that these processes have mapped, each counted once."""
    sizes: dict[tuple[str, str], int] = {}
    for pid in pids:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if "/dev/shm/#" in line:
                addresses, _, offset, device, inode = line.split()[:5]
                start, stop = (int(address, 16) for address in addresses.split("-"))
                file = (device, inode)
                sizes[file] = max(sizes.get(file, 0), int(offset, 16) + stop - start)
    return sum(sizes.values())
