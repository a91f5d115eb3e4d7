"""A user's own task, in a folder where packages with the names of ours lie: the same bits on all backends."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from tests.support.foreign import add_foreign_packages, pushpull_in

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "count_task.py"
_TRAIN = "--device cpu --batch-size 10 --microbatches 2 --steps 3 --out runs"
TRAIN = ["train", "count_task.py:CountTask", *_TRAIN.split()]


def summary(folder: Path) -> Any:
    """What a finished run says of itself."""
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: the task, foreign packages, and the run on one device."""
    folder = tmp_path_factory.mktemp("user")
    shutil.copy(EXAMPLE, folder)
    add_foreign_packages(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*TRAIN, "--backend", "single", "--name", "single"]) == 0
    return folder


@pytest.mark.parametrize("backend", ["ps", pytest.param("ddp", marks=pytest.mark.slow)])
def test_two_workers_give_the_bits_of_one(backend: str, folder: Path) -> None:
    ended = pushpull_in(folder, *TRAIN, "--backend", backend, "--workers", "2", "--name", backend)
    assert ended.returncode == 0, ended.stderr
    one, two = summary(folder / "runs" / "single"), summary(folder / "runs" / backend)
    assert (two["task"], two["workers"], two["steps"]) == ("count", 2, 3)
    assert two["fingerprint"] == one["fingerprint"]
    assert two["state_fingerprint"] == one["state_fingerprint"]
    # Losses and metric were counted in two processes and put together.
    assert two["loss"] == one["loss"]
    assert two["metrics"] == one["metrics"]
