"""Equality, which comes before speed: every backend computes what one process computes."""

from launch.bench_plan import TaskPlan
from launch.bench_result import Equality
from launch.bench_runner import Runner

__all__ = ["check_equality", "ddp_adds_in_tree_order"]


def check_equality(plan: TaskPlan, runner: Runner) -> list[Equality]:
    """Run ``single`` and every backend on every number of workers, and compare what they computed."""
    found = {key: runner.check(plan.name, *key, run_config) for key, run_config in plan.equality.items()}
    if not found:
        return []
    reference, _ = found["single", 1]
    return [
        Equality(
            backend=backend,
            workers=workers,
            servers=servers,
            fingerprint=fingerprint,
            equal=fingerprint == reference,
            expected=backend != "ddp"
            or ddp_adds_in_tree_order(workers, plan.equality[backend, workers].microbatches or 1),
        )
        for (backend, workers), (fingerprint, servers) in found.items()
    ]


def ddp_adds_in_tree_order(workers: int, M: int) -> bool:
    """Whether autograd and the all-reduce happen to add in the order of the canonical tree (E7).

    One rank adds ``(a + b) + c``, the tree over four would be ``(a + b) + (c + d)``.
    """
    return (workers == 1 and M <= 3) or (workers == 2 and M <= 4)
