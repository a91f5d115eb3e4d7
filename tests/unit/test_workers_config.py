"""Settings of a run's plan and of a worker that cannot work are refused before anything starts."""

from typing import Any

import pytest

from paramserver.errors import ConfigError
from workers.config import PlanConfig, WorkerConfig

PLAN: dict[str, Any] = {"batch_size": 8, "microbatches": 4, "steps": 10}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0, "microbatches": 0}, "batch size is 0"),
        ({"microbatches": 0}, "microbatches is 0"),
        ({"microbatches": 9}, "9 microbatches, but only 8 samples .*--microbatches.*--batch-size"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_plans(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PlanConfig(**{**PLAN, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_workers": 0}, "workers is 0"),
        ({"num_workers": 5}, "5 workers, but only 4 microbatches: raise --microbatches"),
        ({"threads": 0}, "threads is 0"),
        ({"precision": "fp8"}, "'fp8': use one of fp32, bf16"),
    ],
)
def test_workers(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WorkerConfig(plan=PlanConfig(**PLAN), **changes)


def test_the_limits_themselves_are_allowed() -> None:
    plan = PlanConfig(batch_size=4, microbatches=4, steps=1)
    assert WorkerConfig(plan=plan, num_workers=4).num_workers == 4
