"""What a run holds of the machine's memory: no more than it says, and no more after a long time."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.config import RunConfig
from launch.run_folder import write_json
from tests.support.memory import arena_bytes, unshared_mib
from tests.support.processes import start, wait_for_line

ALLOWED_MIB = 64
"""What a worker may hold beyond the plain loop and an idle actor."""


@pytest.fixture(scope="module")
def idle_mib() -> float:
    """Unshared memory of a Ray actor that does nothing."""
    from cluster.session import ray_session

    with ray_session(address=None, num_cpus=1, num_gpus=0, store_bytes=1 << 20):
        import ray  # it reads how to authenticate when it is imported

        class Idle:  # here, since an actor's process does not find this module
            def pid(self) -> int:
                return os.getpid()

        actor = ray.remote(Idle).remote()
        return unshared_mib(ray.get(actor.pid.remote()))


def _train(folder: Path, *, task: str, **settings: Any) -> "subprocess.Popen[str]":
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    return start("train", task, *options, "--backend=ps", "--evaluate=false", f"--out={folder}", "--name=ps")


def _pids(folder: Path, role: str) -> list[int]:
    return [p["pid"] for p in json.loads((folder / "processes.json").read_text()) if p["role"] == role]


FULL: dict[str, tuple[dict[str, Any], int]] = {
    "ssd": ({"task": "ssd", "image_size": "256", "batch_size": 16}, 20),
    "fcn": ({"task": "fcn", "image_size": "320x480", "batch_size": 8}, 14),
}
"""Full-size images, and how many steps it takes until neither heap grows."""


def _worker_and_plain_loop(folder: Path, settings: dict[str, Any], steps: int) -> tuple[float, float]:
    """MiB of each; both train at once, so that neither has torch's libraries to itself."""
    run, result = folder / "run.json", folder / "steps.json"
    write_json(run, RunConfig(**settings, backend="single", steps=1000, evaluate=False).to_dict())
    plain = subprocess.Popen([sys.executable, "-P", "-m", "launch.bench_baseline", str(run), str(result)])
    process = _train(folder, workers=1, microbatches=1, steps=1000, **settings)
    try:
        wait_for_line(process, f"step {steps}/")
        (worker,) = _pids(folder / "ps", "worker")
        return unshared_mib(worker), unshared_mib(plain.pid)
    finally:
        plain.kill()
        plain.wait()
        process.terminate()
        process.communicate(timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "steps"), FULL.values(), ids=FULL)
def test_a_worker_holds_little_more_than_a_plain_loop(
    tmp_path: Path, idle_mib: float, settings: dict[str, Any], steps: int
) -> None:
    """Medians of three: how a heap is cut up is chance, and moves either by a tenth."""
    found = []
    for repeat in range(3):
        (tmp_path / str(repeat)).mkdir()
        found.append(_worker_and_plain_loop(tmp_path / str(repeat), settings, steps))
    worker, plain = (statistics.median(values) for values in zip(*found, strict=True))
    print(f"{settings['task']}: worker {worker:.0f} MiB, plain loop {plain:.0f} MiB, idle actor {idle_mib:.0f} MiB")
    assert worker <= plain + idle_mib + ALLOWED_MIB


@pytest.mark.slow
def test_nothing_grows_over_500_steps(tmp_path: Path) -> None:
    process = _train(tmp_path, task="ssd", image_size=64, batch_size=8, workers=2, microbatches=2, steps=700)
    roles = ("driver", "server", "worker")
    held = []
    for step in (100, 600):
        wait_for_line(process, f"step {step}/")
        held.append([unshared_mib(pid) for role in roles for pid in _pids(tmp_path / "ps", role)])
    process.terminate()
    process.communicate(timeout=60)
    grown = [later - earlier for earlier, later in zip(*held, strict=True)]
    print("grown over 500 steps, MiB:", [round(mib, 1) for mib in grown])
    assert max(grown) < 8, "a leak of 16 KiB a step"


def test_shared_memory_is_what_the_arenas_take(tmp_path: Path) -> None:
    """Two versions of the parameters and of the momentum, and a vector for each worker."""
    workers = 3
    process = _train(
        tmp_path, task="ssd", image_size=64, batch_size=8, workers=workers, microbatches=4, servers=2, steps=1000
    )
    wait_for_line(process, "step 2/")
    folder = tmp_path / "ps"
    measured = arena_bytes([*_pids(folder, "server"), *_pids(folder, "worker")])
    process.terminate()
    process.communicate(timeout=60)
    vector = 4_141_056  # TinySSD: 1,031,132 elements in keys of 256 bytes each, whole pages
    words = 2 * 4096  # one for each server, slice and worker; and vectors do not begin at the same place in a page
    momentum = measured - (words + 2 * vector + workers * vector)
    assert 2 * 4 * 1_031_132 <= momentum <= 2 * vector + 2 * (8 << 12), "and a few pages of each server's own"
