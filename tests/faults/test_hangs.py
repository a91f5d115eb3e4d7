"""Nobody waits for ever: who is stopped is named and replaced, and a response that is lost is asked for again."""

from pathlib import Path

import pytest

from tests.support.disturbed import Undisturbed, disturbed, rows_of

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.mark.parametrize(
    ("role", "stage"),
    [
        ("worker", "compute"),
        pytest.param("worker", "push", marks=pytest.mark.slow),
        pytest.param("server", "aggregate", marks=pytest.mark.slow),
    ],
)
def test_who_is_stopped_is_taken_for_dead(tmp_path: Path, undisturbed: Undisturbed, role: str, stage: str) -> None:
    fault = {"stop": {"role": role, "index": 1, "step": 4, "stage": stage}}
    run = disturbed(tmp_path, "ssd", [fault], step_timeout=3.0, servers=2)
    undisturbed.check("ssd", run)
    (lost,) = [row for row in rows_of(run.folder, "events.jsonl") if row["kind"] == "lost"]
    assert (lost["role"], lost["number"], lost["step"]) == (role, 1, 4)
    assert f"{role} 1 (pid {lost['pid']} on {lost['host']})" in lost["text"]
    assert "stage " + stage in lost["text"] or role == "server"


@pytest.mark.slow
def test_a_straggler_is_waited_for(tmp_path: Path, undisturbed: Undisturbed) -> None:
    fault = {"delay": {"role": "worker", "index": 1, "step": 3, "stage": "compute", "seconds": 2.0}}
    run = disturbed(tmp_path, "ssd", [fault], step_timeout=20.0)
    undisturbed.check("ssd", run)
    assert rows_of(run.folder, "events.jsonl") == []


@pytest.mark.parametrize(
    ("transport", "stage"),
    [
        ("auto", "commit"),
        pytest.param("ray", "push", marks=pytest.mark.slow),
        pytest.param("ray", "commit", marks=pytest.mark.slow),
    ],
)
def test_a_response_that_is_dropped_is_asked_for_again(
    tmp_path: Path, undisturbed: Undisturbed, transport: str, stage: str
) -> None:
    fault = {"drop-response": {"role": "server", "index": 0, "step": 3, "stage": stage}}
    run = disturbed(tmp_path, "ssd", [fault], transport=transport, servers=2)
    undisturbed.check("ssd", run)
    assert rows_of(run.folder, "events.jsonl") == [], "nobody was taken for dead"
