"""Where malloc puts tensors before and after a first step, and that it keeps them afterwards."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import re
import resource
from pathlib import Path
import torch
from workers.config import PlanConfig, WorkerConfig
from workers.device import keep_freed_memory, setup_device

def heap():
    found = re.search(r"^(\\w+)-(\\w+) .*\\[heap\\]$", Path("/proc/self/maps").read_text(), re.MULTILINE)
    return range(*(int(address, 16) for address in found.groups()))

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

plan = PlanConfig(batch_size=1, microbatches=1, steps=1)
device = setup_device(WorkerConfig(plan=plan, device="cpu", threads=1))
for mib in (1, 16, 16, 64):  # by default the second of 16 would lie among small blocks
    assert torch.ones(mib << 18).data_ptr() not in heap(), "before a first step"
keep_freed_memory(device)
before = resident_mib()
large, small = torch.ones(64 << 18), torch.ones(1 << 18)
assert large.data_ptr() in heap() and small.data_ptr() in heap(), "after it"
del large, small
assert resident_mib() >= before + 64, "freed and kept"
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
again = torch.ones(32 << 18)
assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt < faults + 1000, "and used again: 8192 pages"
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other malloc")
def test_large_blocks_lie_apart_until_a_first_step_is_over_and_are_kept_from_then_on() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=120)
