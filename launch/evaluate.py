"""``pushpull evaluate``: the metrics of a trained run on its validation split."""

from launch.trained import open_trained
from workers.evaluation import evaluate

__all__ = ["evaluate_run"]


def evaluate_run(run: str, *, data: str | None, threads: int | None) -> dict[str, float]:
    """Compute the metrics in this process, from the same batches as the evaluation at the end of the training.

    Args:
        run: run folder (its newest checkpoint counts), or ``checkpoints/step_N`` in it.
        data: other data than the run's; the classes must be the same.
        threads: other threads than the run's.

    Returns:
        The values by name: those in summary.json, if checkpoint, data, threads and kind of device are the same.

    Raises:
        ConfigError, CheckpointError: see ``open_trained``.
        models.errors.DataError: if a sample cannot be read.
    """
    trained = open_trained(run, data=data, threads=threads)
    return evaluate(trained.task, trained.replica, trained.worker).compute()
