"""What makes a device faster leaves all backends with the same bits."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import SMALL, train


def test_loader_processes_change_nothing(ray_cluster: None, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**SMALL["ssd"], "microbatches": 4, "steps": 3}
    single = train(tmp_path, "single", backend="single", **settings).summary
    drawn = train(tmp_path, "ps", in_session=True, backend="ps", workers=2, loader_processes=1, **settings).summary
    assert drawn["state_fingerprint"] == single["state_fingerprint"]


@pytest.mark.slow  # half a minute and more on a processor that was not made for them
@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {"precision": "fp16"}, {"compile": True}])
def test_two_workers_and_two_ranks_give_the_bits_of_one_device(
    ray_cluster: None, tmp_path: Path, settings: dict[str, Any]
) -> None:
    run = {**SMALL["ssd"], "microbatches": 4, "steps": 3, **settings}
    single = train(tmp_path, "single", backend="single", **run).summary
    several = train(tmp_path, "ps", in_session=True, backend="ps", workers=2, **run).summary
    assert several["state_fingerprint"] == single["state_fingerprint"]
    ranks = train(tmp_path, "ddp", backend="ddp", workers=2, **run).summary
    assert ranks["fingerprint"] == single["fingerprint"]
