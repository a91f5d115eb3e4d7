"""What a run holds of the machine's memory: no more than it says, and no more after a long time."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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


def _pids(folder: Path, role: str) -> list[int]:
    return [p["pid"] for p in json.loads((folder / "processes.json").read_text()) if p["role"] == role]


@pytest.fixture
def plain_loop(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[int]:
    """Process id of a plain torch loop that trains on."""
    settings, result = tmp_path / "run.json", tmp_path / "steps.json"
    write_json(settings, RunConfig(**request.param, backend="single", steps=1000, evaluate=False).to_dict())
    process = subprocess.Popen([sys.executable, "-P", "-m", "launch.bench_baseline", str(settings), str(result)])
    yield process.pid
    process.kill()
    process.wait()


FULL = {
    "ssd": ({"task": "ssd", "image_size": "256", "batch_size": 16}, 20),
    "fcn": ({"task": "fcn", "image_size": "320x480", "batch_size": 8}, 14),
}
"""Full-size images, and how many steps it takes until neither heap grows."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plain_loop", "settings", "steps"), [(s, s, n) for s, n in FULL.values()], ids=FULL, indirect=["plain_loop"]
)
def test_a_worker_holds_little_more_than_a_plain_loop(
    tmp_path: Path, idle_mib: float, plain_loop: int, settings: dict[str, object], steps: int
) -> None:
    """Both run at once, so that neither has torch's libraries to itself."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if name != "task"]
    process = start(
        "train",
        str(settings["task"]),
        *options,
        "--backend=ps",
        "--workers=1",
        "--microbatches=1",
        "--evaluate=false",
        "--steps=1000",
        f"--out={tmp_path}",
        "--name=ps",
    )
    wait_for_line(process, f"step {steps}/")
    (worker,) = _pids(tmp_path / "ps", "worker")
    held, plain = unshared_mib(worker), unshared_mib(plain_loop)
    process.terminate()
    process.communicate(timeout=60)
    print(f"{settings['task']}: worker {held:.0f} MiB, plain loop {plain:.0f} MiB, idle actor {idle_mib:.0f} MiB")
    assert held <= plain + idle_mib + ALLOWED_MIB


@pytest.mark.slow
def test_nothing_grows_over_500_steps(tmp_path: Path) -> None:
    process = start(
        "train",
        "ssd",
        "--image-size=64",
        "--batch-size=8",
        "--backend=ps",
        "--workers=2",
        "--microbatches=2",
        "--evaluate=false",
        "--steps=700",
        f"--out={tmp_path}",
        "--name=ps",
    )
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
    """Two versions of the parameters, and a vector for each worker."""
    workers = 3
    process = start(
        "train",
        "ssd",
        "--image-size=64",
        "--batch-size=8",
        "--backend=ps",
        f"--workers={workers}",
        "--microbatches=4",
        "--servers=2",
        "--evaluate=false",
        "--steps=1000",
        f"--out={tmp_path}",
        "--name=ps",
    )
    wait_for_line(process, "step 2/")
    folder = tmp_path / "ps"
    measured = arena_bytes([*_pids(folder, "server"), *_pids(folder, "worker")])
    process.terminate()
    process.communicate(timeout=60)
    vector = 4_141_056  # TinySSD: 1,031,132 elements in keys of 256 bytes each, whole pages
    assert measured == 4096 + 2 * vector + workers * vector
