"""The report of a benchmark on disk."""

import json
import re
from pathlib import Path

import pytest

from launch.report import write_report
from launch.report_tables import speed_table, to_markdown
from tests.support.bench_results import bench_result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report")
    write_report(bench_result(), path)
    return path


def test_files(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names == {"bench.json", "bench.md", "report.html", "ssd-speedup.png", "ssd-phases.png"}


def test_json_has_what_readers_rely_on(folder: Path) -> None:
    content = json.loads((folder / "bench.json").read_text())
    assert {"config", "environment", "simulated", "label", "tasks"} <= content.keys()
    task = content["tasks"]["ssd"]
    assert task["equality"][0].keys() >= {"backend", "workers", "servers", "fingerprint", "equal"}
    row = task["rows"][2]
    assert (row["scaling"], row["backend"], row["workers"], row["batch_size"]) == ("weak", "ps", 2, 16)
    for name in ("images_per_s", "step_ms", "speedup"):
        assert row[name].keys() == {"median", "min", "max"}
    assert len(row["repeats"]) == 3
    assert "Weak scaling: ps with 2 workers" in task["limits"]
    assert "Strong scaling: ps with 2 workers" in task["limits"]


def test_markdown_puts_equality_first_and_the_baseline_at_one(folder: Path) -> None:
    text = (folder / "bench.md").read_text()
    places = [text.index(part) for part in ("equal to single", "### ssd, weak", "### ssd, strong", "## Environment")]
    assert places == sorted(places)
    assert re.search(r"\| baseline +\| 8 .* \| 1x +\| 100% ", text)
    assert "CPU stand-ins, no GPU figure" in text
    assert "<b>demo</b> size" in text


def test_columns_of_a_table_line_up() -> None:
    table = [line for line in to_markdown(speed_table(bench_result(), "ssd", "weak")).splitlines() if "|" in line]
    assert len({len(line) for line in table}) == 1
    assert len(table) == 2 + 5


def test_html_is_self_contained(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert "<script" not in page
    assert "<link" not in page
    assert "@import" not in page
    assert "url(" not in page
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://", page)


def test_html_escapes_what_the_user_wrote(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert "&lt;b&gt;demo&lt;/b&gt; size" in page
    assert "<b>" not in page
