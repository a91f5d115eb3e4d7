"""The report of a benchmark on disk: bench.json, bench.md, pictures, and report.html, which needs no other file."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from launch.bench_result import BenchResult
from launch.report_console import equality_heading
from launch.report_plots import write_plots
from launch.report_tables import header_lines, speed_table, to_markdown
from launch.run_folder import write_json

__all__ = ["data_uri", "page", "to_html", "write_report"]


def write_report(result: BenchResult, folder: Path) -> None:
    """Write every file of the benchmark into its (existing) folder."""
    write_json(folder / "bench.json", result.to_dict())
    plots = write_plots(result, folder)
    (folder / "bench.md").write_text(_to_markdown(result, plots), encoding="utf-8")
    (folder / "report.html").write_text(to_html(result, plots), encoding="utf-8")


def _to_markdown(result: BenchResult, plots: Mapping[str, Sequence[Path]]) -> str:
    label = f" ({result.label})" if result.label else ""
    blocks = [f"# Benchmark {result.name}{label}", "\n".join(f"- {line}" for line in header_lines(result))]
    blocks.append(f"```\n{result.command}\n```")
    for name, task in result.tasks.items():
        checks = "\n".join(f"- {check.sentence}" for check in task.equality)
        blocks += [f"## {name}", equality_heading(result, task.equality), *([checks] if checks else [])]
        blocks += [to_markdown(speed_table(result, name, scaling)) for scaling in task.limits]
        blocks += [f"![{path.stem}]({path.name})" for path in plots[name]]
    blocks += ["## Environment", "\n".join(f"- {key}: {value}" for key, value in _environment(result))]
    blocks += ["## One command a row", "```\n" + "\n".join(_commands(result)) + "\n```"]
    return "\n\n".join(blocks) + "\n"


def to_html(result: BenchResult, plots: Mapping[str, Sequence[Path]]) -> str:
    """The page of a benchmark."""
    tasks = [
        {
            "name": name,
            "heading": equality_heading(result, task.equality),
            "equality": task.equality,
            "tables": [speed_table(result, name, scaling) for scaling in task.limits],
            "plots": [(path.stem, data_uri(path.read_bytes())) for path in plots[name]],
        }
        for name, task in result.tasks.items()
    ]
    return page(
        "report.html",
        result=result,
        header=header_lines(result),
        tasks=tasks,
        environment=_environment(result),
        commands=_commands(result),
    )


def page(template: str, **content: Any) -> str:
    """A page without scripts that loads nothing: styles and pictures stand in it."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    ).get_template(template)
    return found.render(**content)


def data_uri(png: bytes) -> str:
    """A PNG file as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _environment(result: BenchResult) -> list[tuple[str, Any]]:
    """The environment as name and value, libraries in one line."""
    flat = {key: value for key, value in result.environment.items() if key != "packages"}
    flat["gpus"] = ", ".join(flat.get("gpus", [])) or "none"
    flat["packages"] = ", ".join(f"{name} {version}" for name, version in result.environment["packages"].items())
    return [(key.replace("_", " "), value) for key, value in flat.items() if value is not None]


def _commands(result: BenchResult) -> list[str]:
    """What repeats each row by itself, each once; the baseline has none but the benchmark."""
    return list(dict.fromkeys(row.command for task in result.tasks.values() for row in task.rows if row.command))
