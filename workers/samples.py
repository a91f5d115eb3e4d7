"""Samples of a worker's microbatches, in the order in which it needs them, each drawn under its own seed."""

import ctypes
import os
import secrets
import signal
from collections.abc import Iterator, Sized
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from functools import partial
from multiprocessing import connection, resource_tracker
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from models.errors import TaskError
from models.registry import Packed, pack
from models.task import Batch, Sample, Task
from paramserver.errors import ConfigError, PushPullError
from workers.config import WorkerConfig
from workers.minibatch import MinibatchPlan
from workers.seeding import seeded

__all__ = ["MicrobatchLoader", "SeededDataset", "begun", "build_loader", "drawn", "where_drawn"]

_PREFETCH = 2
"""Microbatches that each loader process is ahead."""
_PR_SET_PDEATHSIG = 1  # as sys/prctl.h has it


class SeededDataset(Dataset[Sample]):
    """Takes ``(epoch, index)``, since a data set of its own never learns the epoch, and seeds by both.

    Args:
        dataset: the training set.
        seed: the run's.
    """

    def __init__(self, dataset: Dataset[Sample], seed: int) -> None:
        self._dataset = dataset
        self._seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        with seeded("sample", self._seed, epoch, index):
            return self._dataset[index]


class _Elsewhere(Dataset[Any]):
    """The training set and its task in a loader process, where they are unpacked when they are used first.

    What is raised there comes back as a result: a ``DataLoader`` would put a traceback into its message.
    """

    def __init__(self, packed: Packed) -> None:
        self._packed = packed
        self._unpacked: tuple[Dataset[Sample], Task] | None = None
        self.size = 0
        """Samples that a sampler may number."""

    def _open(self) -> tuple[Dataset[Sample], Task]:
        if self._unpacked is None:
            self._unpacked = self._packed.unpack()
        return self._unpacked

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: Any) -> Sample | Exception:
        try:
            return self._open()[0][key]
        except Exception as error:
            return error

    def collate(self, samples: list[Sample | Exception]) -> Batch | Exception:
        """See ``Task.collate``."""
        try:
            for sample in samples:
                if isinstance(sample, Exception):
                    return sample
            return self._open()[1].collate(cast(list[Sample], samples))
        except Exception as error:
            return error


def _begin_process(threads: int, parent: int, _number: int) -> None:
    """In a loader process: compute as the worker would, and end when it does, not before."""
    os.setpgid(0, 0)  # what a terminal or a scheduler sends to the whole group is for the worker, which may go on
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # drops one that has come already
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    connection.arbitrary_address = _address_without_a_file  # type: ignore[attr-defined]  # not in the stubs
    torch.set_num_threads(threads)  # a mean over an image depends on it
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was too late for that
        os._exit(0)


def _address_without_a_file(_family: str) -> str:
    """Of the socket by which batches are handed over, in Linux' abstract namespace.

    Python's own lies in a folder, which stays behind when the worker ends before its loader processes.
    """
    return f"\0pushpull-{os.getpid()}-{secrets.token_hex(8)}"


@contextmanager
def _signals_as_they_were() -> Iterator[None]:
    """Processes started in the block do not end by SIGTERM before they have begun, when they leave this group.

    Nor does this one hear of their ends by a signal: torch's handler raises in the middle of whatever runs, of a push
    or of an update. Who waits for a batch looks whether its process is alive (every 5 seconds, torch's
    ``MP_STATUS_CHECK_INTERVAL``), and raises where a batch is asked for.
    """
    resource_tracker.ensure_running()  # in the block it would let SIGTERM through again
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGCHLD) is not handler:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def _remedy_named() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise PushPullError(
            f"{str(error).splitlines()[0]}: it may have run out of memory or been killed; "
            "--loader-processes 0 draws samples without any"
        ) from error


def begun(loader: DataLoader[Any]) -> Iterator[Any]:
    """Its batches from the first on; ``drawn`` takes one.

    Raises:
        PushPullError: if a loader process has ended.
    """
    with _remedy_named(), _signals_as_they_were() if loader.num_workers else nullcontext():
        return iter(loader)


def drawn(batches: Iterator[Any]) -> Batch:
    """The next one.

    Raises:
        PushPullError: if a loader process has ended.
        Exception: whatever the data set or its transforms raised.
    """
    with _remedy_named():
        batch = next(batches)
    if isinstance(batch, Exception):
        raise batch
    return cast(Batch, batch)


def where_drawn(dataset: Dataset[Sample], task: Task, processes: int) -> tuple[Dataset[Any], dict[str, Any]]:
    """What a ``DataLoader`` draws from, and its settings: in this process, or in ``processes`` of its own.

    Raises:
        ConfigError: if there are to be processes and the data set cannot be sent to them.
    """
    if not processes:
        return dataset, {"collate_fn": task.collate}
    try:
        elsewhere = _Elsewhere(pack((dataset, task)))
    except TaskError as error:
        raise ConfigError(f"{error}: say --loader-processes 0") from error
    if isinstance(dataset, Sized):
        elsewhere.size = len(dataset)
    return elsewhere, {
        "collate_fn": elsewhere.collate,
        "num_workers": processes,
        "multiprocessing_context": "spawn",  # a fork would share locks with threads that do not exist in it
        "persistent_workers": True,
        "prefetch_factor": _PREFETCH,
        "worker_init_fn": partial(_begin_process, torch.get_num_threads(), os.getpid()),
    }


class _RunSampler(Sampler[list[tuple[int, int]]]):
    """Keys of each non-empty microbatch of a run, step by step."""

    def __init__(self, plan: MinibatchPlan) -> None:
        self._plan = plan
        self.run = range(0)
        self.first_step = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.first_step, self._plan.config.steps):
            epoch = self._plan.epoch(step)
            microbatches = self._plan.microbatches(step)
            for index in self.run:
                if microbatches[index]:
                    yield [(epoch, sample) for sample in microbatches[index]]


class MicrobatchLoader:
    """Gives the batches of one run of microbatches after the other; ``begin`` says of which.

    Loader processes live as long as this does, since starting one takes seconds; each ends with the process that
    started it, however that ends.

    Args:
        task: collates.
        dataset: the training set.
        plan: which samples come when.
        processes: that draw samples in the background; 0: this one draws them when it is asked.
        pin_memory: whether batches go to a GPU.

    Raises:
        ConfigError: if there are to be processes and the data set cannot be sent to them.
    """

    def __init__(
        self,
        task: Task,
        dataset: Dataset[Sample],
        plan: MinibatchPlan,
        *,
        processes: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.plan = plan
        self._sampler = _RunSampler(plan)
        source, settings = where_drawn(SeededDataset(dataset, plan.config.seed), task, processes)
        self._loader: DataLoader[Any] = DataLoader(
            source,
            batch_sampler=self._sampler,
            pin_memory=pin_memory,
            # Of its own: it would draw from the global one, which belongs to the samples.
            generator=torch.Generator(),
            **settings,
        )
        self._batches: Iterator[Any] = iter(())
        self._prepared: Future[Batch] | None = None

    def begin(self, run: range, first_step: int) -> None:
        """Whatever comes next is of these microbatches, from this step on, counted from 0."""
        self._sampler.run, self._sampler.first_step = run, first_step
        self._prepared = None
        self._batches = begun(self._loader)

    def next(self) -> Batch:
        """The next non-empty microbatch."""
        self._prepare()
        assert self._prepared is not None
        prepared, self._prepared = self._prepared, None
        return prepared.result()

    def prepare(self) -> None:
        """Draw the next microbatch now, if there is one left and nobody else does; ``next`` raises what that raises."""
        if not self._loader.num_workers:  # others are ahead anyway, and one who is late is waited for when it is needed
            self._prepare()

    def _prepare(self) -> None:
        if self._prepared is None:
            self._prepared = Future()
            try:
                self._prepared.set_result(drawn(self._batches))
            except Exception as error:
                self._prepared.set_exception(error)

    def close(self) -> None:
        """End the loader processes; what an interpreter that exits finds alive it terminates, with a traceback."""
        self._prepared = None
        self._batches = iter(())
        del self._loader  # its iterator goes with it, and the processes with that


def build_loader(task: Task, config: WorkerConfig) -> MicrobatchLoader:
    """The loader of a worker, whatever its run."""
    dataset = task.build_dataset("train")
    plan = MinibatchPlan(config.plan, len(dataset))  # type: ignore[arg-type]
    pin_memory = config.device == "cuda"
    return MicrobatchLoader(task, dataset, plan, processes=config.loader_processes, pin_memory=pin_memory)
