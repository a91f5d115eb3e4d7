"""The benchmark of one round, through the command line."""

import json
from typing import Any

import pytest

from launch.cli import main


@pytest.mark.parametrize("extra", [[], pytest.param(["--transport", "ray", "--servers", "2"], marks=pytest.mark.slow)])
def test_one_json_object_and_nothing_else(capsys: pytest.CaptureFixture[str], extra: list[str]) -> None:
    command = ["bench", "sync", "--params", "0.5", "--workers", "2", "--rounds", "5", "--json", *extra]
    assert main(command) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    for name in ("ours", "ddp", "ray_example", "limit"):
        assert result[f"{name}_ms_min"] <= result[f"{name}_ms"] <= result[f"{name}_ms_max"]
    assert result["ours/ddp"] == pytest.approx(result["ours_ms"] / result["ddp_ms"])
    assert result["parameter_bytes"] == 500_000
    assert (result["workers"], result["rounds"]) == (2, 5)
    if not extra:
        vector = 503_808  # 123 pages
        page = 4096  # vectors do not begin at the same place in a page
        versions, own, sums = page + 2 * vector + page, 5 * page + 2 * vector, 2 * vector
        assert result["arena_bytes"] == versions + own + sums, "parameters, momentum, a vector a worker"


def test_parameters_that_nobody_knows(capsys: pytest.CaptureFixture[str]) -> None:
    for words, complaint in [(["--params", "resnet"], "resnet"), (["--workers", "0"], "--workers is 0")]:
        assert main(["bench", "sync", *words]) == 2
        assert complaint in capsys.readouterr().err
