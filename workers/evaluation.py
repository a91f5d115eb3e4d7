"""One worker's part of an evaluation: every N-th batch of the validation split."""

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset, Subset

from models.task import Batch, Metric, Sample, Task
from workers.config import WorkerConfig
from workers.precision import autocast
from workers.replica import Replica

__all__ = ["evaluate"]


def evaluate(task: Task, replica: Replica, config: WorkerConfig) -> Metric:
    """The metric over this worker's batches, with the buffers and parameters that the replica holds.

    Batches are the same whatever the number of workers, so the merged metric is, too.
    """
    metric = task.build_metric()
    with (
        replica.evaluating() as model,
        autocast(replica.device.type, config.precision),
    ):
        for batch in _batches(task, task.build_dataset("val"), config):
            metric.update(task.predict(model, batch.to(replica.device, channels_last=config.channels_last)), batch)
    return metric


def _batches(task: Task, dataset: Dataset[Sample], config: WorkerConfig) -> Iterator[Batch]:
    count: int = len(dataset)  # type: ignore[arg-type]
    size = config.eval_batch_size
    own = [index for index in range(count) if index // size % config.num_workers == config.worker]
    # A generator of its own: the loader would draw its base seed from the global one.
    yield from DataLoader(Subset(dataset, own), size, collate_fn=task.collate, generator=torch.Generator())
