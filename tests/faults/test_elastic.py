"""Workers come and go during a run: the bits are those of one worker all along."""

import itertools
from pathlib import Path

import pytest

from tests.support.disturbed import SETTINGS, Undisturbed, disturbed, ledger_of, rows_of
from tests.support.runs import SMALL, train

pytestmark = pytest.mark.usefixtures("ray_cluster")


def _workers_by_step(folder: Path) -> list[int]:
    """How many workers computed each step."""
    rows = rows_of(folder, "ledger.jsonl")
    return [len({part["worker"] for part in row["microbatches"]}) for row in rows]


def test_two_then_four_then_one_then_three_workers(tmp_path: Path) -> None:
    """In a scenario the run waits for those who come, so that a short one sees them all."""
    settings = {**SETTINGS, "steps": 12}
    single = train(tmp_path, "single", backend="single", **SMALL["ssd"], **settings)
    faults = [{"scale": {"workers": count, "step": step}} for step, count in ((1, 4), (4, 1), (7, 3))]
    run = disturbed(tmp_path, "ssd", faults, **settings)
    assert run.summary["state_fingerprint"] == single.summary["state_fingerprint"]
    assert ledger_of(run.folder) == ledger_of(single.folder)
    assert [count for count, _ in itertools.groupby(_workers_by_step(run.folder))] == [2, 4, 1, 3]


@pytest.mark.slow
def test_who_is_beyond_the_number_of_microbatches_waits(tmp_path: Path, undisturbed: Undisturbed) -> None:
    """Five for four microbatches; when one is killed, the fifth is there at once."""
    faults = [
        {"scale": {"workers": 5, "step": 1}},
        {"kill": {"role": "worker", "index": 2, "step": 5, "stage": "compute"}},
    ]
    run = disturbed(tmp_path, "ssd", faults, workers=4)
    undisturbed.check("ssd", run)
    assert _workers_by_step(run.folder) == [4, 4, 4, 4, 4, 4]
    numbers = {part["worker"] for part in rows_of(run.folder, "ledger.jsonl")[4]["microbatches"]}
    assert numbers == {0, 1, 3, 4}
