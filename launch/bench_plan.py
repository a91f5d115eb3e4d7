"""What a benchmark will run: rows and equality checks as settings of runs, all of them checked before any starts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from launch.bench_config import BenchConfig, Scaling
from launch.config import Backend, RunConfig
from launch.resolve import Resolved, resolve
from paramserver.errors import ConfigError

__all__ = ["BASELINE", "Row", "TaskPlan", "plan_task", "row_command"]

BASELINE: Literal["baseline"] = "baseline"
_DEVICE_BATCH = {"ssd": 16, "fcn": 4}
_OTHER_BATCH = 8


@dataclass(frozen=True)
class Row:
    """One line of a table: what runs, on how many devices, on how many images a step."""

    scaling: Scaling
    backend: Backend | Literal["baseline"]
    workers: int
    batch_size: int
    """Images of one step over all workers."""

    @property
    def is_baseline(self) -> bool:
        """Whether this is the plain torch loop."""
        return self.backend == BASELINE


@dataclass(frozen=True)
class TaskPlan:
    """Everything that is run for one task."""

    name: str
    device_batch: int
    """Images of one device."""
    rows: dict[Row, RunConfig]
    """The settings of each row, in the order of the tables; the baseline comes first for each kind of scaling."""
    equality: dict[tuple[Backend, int], RunConfig]
    """Settings of the equality check by backend and workers; ``single`` comes first. Empty if it is left out."""
    simulated: bool
    """Whether CPU cores stand in for GPUs."""
    model_bytes: int


def plan_task(task: str, config: BenchConfig) -> TaskPlan:
    """Work out the rows of one task.

    Raises:
        ConfigError: if a row could not run.
    """
    first = resolve(_run_config(task, config, "single", 1, config.batch_size or _OTHER_BATCH, 1, 1))
    device_batch = config.batch_size or _DEVICE_BATCH.get(first.task.name, _OTHER_BATCH)
    steps = config.warmup + config.steps
    rows = {}
    for row in _rows(config, device_batch):
        _check_size(task, row, first.num_samples)
        backend: Backend = "single" if row.backend == BASELINE else row.backend
        # A minibatch is cut into one part for each device; the baseline never cuts it.
        rows[row] = _run_config(task, config, backend, row.workers, row.batch_size, row.workers, steps)
    for backend in config.backend_names:
        resolve(max((run for run in rows.values() if run.backend == backend), key=lambda run: run.workers or 1))
    equality = _equality(task, config, first.num_samples)
    return TaskPlan(first.task.name, device_batch, rows, equality, first.simulated, _model_bytes(first))


def _check_size(task: str, row: Row, num_samples: int) -> None:
    what = f"{task}, {row.scaling} scaling to {row.workers}: a minibatch of {row.batch_size} images is"
    if row.batch_size > num_samples:
        raise ConfigError(
            f"{what} larger than the training set of {num_samples}: lower --batch-size or the largest of --workers"
        )
    if row.batch_size < row.workers:
        raise ConfigError(f"{what} smaller than the number of workers: raise --batch-size, or leave strong out")


def _rows(config: BenchConfig, device_batch: int) -> list[Row]:
    rows = []
    for scaling in config.scalings:
        rows.append(Row(scaling, BASELINE, 1, device_batch))
        for backend in config.backend_names:
            for workers in [1] if backend == "single" else config.worker_counts:
                rows.append(Row(scaling, backend, workers, device_batch * (workers if scaling == "weak" else 1)))
    return rows


def _equality(task: str, config: BenchConfig, num_samples: int) -> dict[tuple[Backend, int], RunConfig]:
    if not config.equality_steps:
        return {}
    M = 1 << (max(config.worker_counts) - 1).bit_length()
    batch_size = min(num_samples, 2 * M + (M > 1))  # one part has a sample more than the others: weights matter
    runs: list[tuple[Backend, int]] = [("single", 1)]
    runs += [
        (backend, workers)
        for backend in config.backend_names
        if backend != "single"
        for workers in config.worker_counts
    ]
    return {
        (backend, workers): _run_config(task, config, backend, workers, batch_size, M, config.equality_steps)
        for backend, workers in runs
    }


def _run_config(
    task: str, config: BenchConfig, backend: Backend, workers: int, batch_size: int, M: int, steps: int
) -> RunConfig:
    return RunConfig(
        task=task,
        backend=backend,
        workers=workers,
        servers=config.servers,
        microbatches=M,
        batch_size=batch_size,
        steps=steps,
        seed=config.seed,
        data=config.data,
        augment=config.augment,
        loader_processes=config.loader_processes,
        image_size=config.image_size,
        model=config.model,
        precision=config.precision,
        compile=config.compile,
        channels_last=config.channels_last,
        threads=config.threads,
        device=config.device,
        share_device=config.share_device,
        drop_last=True,  # a short minibatch would be a fast step
        evaluate=False,
        spares=0,  # it would start while steps are measured; afterwards it only sleeps
    )


def _model_bytes(run: Resolved) -> int:
    """Parameters and buffers in bytes, with room for the padding between them."""
    model = run.task.build_model()
    tensors = [*model.parameters(), *model.buffers()]
    return sum(-(-tensor.numel() * tensor.element_size() // 256) * 256 for tensor in tensors)


def row_command(row: Row, run: RunConfig) -> str:
    """The command that repeats one row, or an empty string for the baseline, which is no run of its own."""
    if row.is_baseline:
        return ""
    words: Sequence[str] = [
        f"pushpull train {run.task} --backend {run.backend}",
        f"--workers {run.workers} --servers {run.servers} --spares 0"
        if run.backend == "ps"
        else f"--workers {run.workers}",
        f"--microbatches {run.microbatches} --batch-size {run.batch_size} --steps {run.steps} --seed {run.seed}",
        f"--data {run.data}" if run.data != "synthetic" else "",
        f"--model {run.model}" if run.model else "",
        f"--augment {run.augment}" if run.augment else "",
        f"--loader-processes {run.loader_processes}" if run.loader_processes is not None else "",
        f"--image-size {run.image_size}" if run.image_size else "",
        f"--precision {run.precision}" if run.precision != "fp32" else "",
        "--compile" if run.compile else "",
        "--channels-last" if run.channels_last else "",
        f"--threads {run.threads} --device {run.device} --drop-last --evaluate false",
    ]
    return " ".join(word for word in words if word)
