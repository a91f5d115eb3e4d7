"""One real benchmark, as small as can be, through the command line."""

import json
import shlex
from pathlib import Path

import pytest

from launch.cli import main

_SMALL = shlex.split(
    "bench ssd --backends single,ps --workers 1 --repeats 1 --steps 2 --warmup 1 --image-size 64 --batch-size 4 "
    "--scaling weak --equality-steps 2 --label tiny --name small"
)


@pytest.mark.timeout(240)
def test_small_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*_SMALL, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert shown.index("ps, 1 worker, 1 server: equal to single") < shown.index("| baseline")
    assert "CPU stand-ins" in shown or "NVIDIA" in shown

    content = json.loads((tmp_path / "small" / "bench.json").read_text())
    rows = content["tasks"]["ssd"]["rows"]
    assert [(row["backend"], row["workers"], row["batch_size"]) for row in rows] == [
        ("baseline", 1, 4),
        ("single", 1, 4),
        ("ps", 1, 4),
    ]
    assert all(row["speedup"]["median"] > 0 and len(row["repeats"]) == 1 for row in rows)
    assert rows[0]["speedup"]["median"] == 1.0
    assert all(check["equal"] for check in content["tasks"]["ssd"]["equality"])
    assert (content["label"], content["config"]["image_size"]) == ("tiny", 64)
    assert {path.name for path in (tmp_path / "small").iterdir()} >= {"bench.md", "report.html", "ssd-speedup.png"}
    assert [path.name for path in tmp_path.iterdir()] == ["small"], "run folders are thrown away"

    # The folder is there now: it is refused before anything runs.
    assert main([*_SMALL, "--out", str(tmp_path)]) == 2
    assert "choose another --name, or say --overwrite" in capsys.readouterr().err


def test_overwrite_spares_what_is_no_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "thesis.tex").touch()
    assert main([*_SMALL, "--out", str(tmp_path), "--overwrite"]) == 2
    assert "not a benchmark's folder" in capsys.readouterr().err
    assert (tmp_path / "small" / "thesis.tex").exists()
