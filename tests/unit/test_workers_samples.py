"""Loader processes give the batches that the worker itself would draw, tell what is wrong, and end with it."""

import contextlib
import os
import select
import subprocess
import sys
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch

from models.errors import DataError
from models.options import TaskOptions
from models.registry import build_task
from models.task import Batch, Task
from paramserver.errors import ConfigError, PushPullError
from workers.config import PlanConfig
from workers.minibatch import MinibatchPlan
from workers.samples import MicrobatchLoader

ROOT = Path(__file__).resolve().parents[2]
PLAN = MinibatchPlan(PlanConfig(batch_size=6, microbatches=2, steps=4, seed=3), 12)


def _loader(task: Task, processes: int) -> MicrobatchLoader:
    return MicrobatchLoader(task, task.build_dataset("train"), PLAN, processes=processes)


def _same(one: Batch, other: Batch) -> bool:
    equal = torch.equal(one.images, other.images) and torch.equal(one.ids, other.ids)
    return equal and all(torch.equal(one.targets[name], other.targets[name]) for name in one.targets)


def test_batches_from_processes_are_those_of_the_worker_itself_also_in_its_next_run() -> None:
    task = build_task("ssd", TaskOptions(image_size=(64, 64), synthetic_train=12, augment="ssd"))
    here, there = _loader(task, 0), _loader(task, 2)
    for run, first_step, count in ((range(2), 0, 3), (range(1, 2), 1, 3), (range(2), 3, 2)):
        here.begin(run, first_step)
        there.begin(run, first_step)  # what the last run has drawn beforehand is dropped
        assert all(_same(here.next(), there.next()) for _ in range(count))


USER_TASK = """
from models.errors import DataError
from models.ssd.task import SSDTask
from torch.utils.data import Dataset

class Broken(Dataset):
    def __len__(self):
        return 12
    def __getitem__(self, index):
        raise DataError(f"image {index} is unreadable")

class Mine(SSDTask):
    def build_dataset(self, split):
        return Broken()
"""


def test_an_error_of_a_users_own_data_set_comes_as_it_was_raised(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(USER_TASK, encoding="utf-8")
    loader = _loader(build_task(f"{file}:Mine", TaskOptions()), 1)
    loader.begin(range(2), 0)
    with pytest.raises(DataError) as caught:
        loader.next()
    assert str(caught.value) == f"image {PLAN.microbatches(0)[0][0]} is unreadable"


def test_a_data_set_that_cannot_be_sent_is_named_with_the_remedy() -> None:
    task = build_task("ssd", TaskOptions())
    dataset = task.build_dataset("train")
    dataset.secret = lambda: None  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="--loader-processes 0"):
        MicrobatchLoader(task, dataset, PLAN, processes=1)


def test_loader_processes_end_with_the_loader() -> None:
    before = set(active_children())
    loader = _loader(build_task("ssd", TaskOptions(image_size=(64, 64), synthetic_train=12)), 2)
    loader.begin(range(2), 0)
    loader.next()
    assert len(set(active_children()) - before) == 2
    loader.close()
    assert set(active_children()) <= before


PROGRAM = """
import multiprocessing, sys
from tests.unit.test_workers_samples import PLAN, _loader
from models.options import TaskOptions
from models.registry import build_task

if __name__ == "__main__":
    loader = _loader(build_task("ssd", TaskOptions(image_size=(64, 64), synthetic_train=12)), 1)
    loader.begin(range(2), 0)
    loader.next()
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    sys.stdin.read()
"""


def test_a_loader_process_that_is_killed_is_named_with_the_remedy() -> None:
    before = set(active_children())
    loader = _loader(build_task("ssd", TaskOptions(image_size=(64, 64), synthetic_train=12)), 1)
    loader.begin(range(2), 0)
    (process,) = set(active_children()) - before
    process.kill()  # it has begun nothing yet
    process.join()  # nothing is raised where no batch is asked for
    named = r"^DataLoader worker .*--loader-processes 0 .*$"
    with pytest.raises(PushPullError, match=named):
        loader.next()
    with pytest.raises(PushPullError, match=named):
        loader.begin(range(2), 0)


def test_they_end_with_a_worker_that_is_killed(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    (tmp_path / "temporary").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "temporary")}
    with subprocess.Popen(
        [sys.executable, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as worker:
        assert worker.stdout is not None
        pids = [int(pid) for pid in worker.stdout.readline().split()]
        worker.kill()
        worker.wait()
    assert pids
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            assert select.select([os.pidfd_open(pid)], [], [], 10)[0]
    assert not list((tmp_path / "temporary").iterdir())
