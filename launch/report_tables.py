"""The tables of a benchmark as rows of text, and as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass

from launch.bench_limits import phase_shares
from launch.bench_result import BenchResult, RowResult, Spread

__all__ = ["Table", "header_lines", "speed_table", "to_markdown"]

_COLUMNS = ("", "batch", "images/s", "step ms", "speedup", "efficiency", "where the time goes", "bits")


@dataclass(frozen=True)
class Table:
    """A table and what stands above and below it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]


def header_lines(result: BenchResult) -> list[str]:
    """What must be known before any figure is read."""
    config = result.config
    environment = result.environment
    lines = []
    if result.simulated:
        lines.append(
            f"CPU stand-ins, no GPU figure: each device is {config['threads']} thread(s) of a machine with "
            f"{environment['cpu_cores']} cores ({environment['cpu']})"
        )
    else:
        lines.append(f"devices: {len(environment['gpus'])} x {environment['gpus'][0]}")
    layout = ", channels_last" * config["channels_last"] + ", compiled" * config["compile"]
    lines.append(
        f"{config['precision']}{layout}, data: {config['data']}; median of {config['steps']} steps after "
        f"{config['warmup']} warm-up steps, {config['repeats']} interleaved repeat(s): median (min–max)"
    )
    lines.append(
        "baseline: a plain torch loop on one device, the whole minibatch at once, fused optimizer, no Ray; "
        "a speedup is the ratio to the baseline of the same repeat"
    )
    return lines


def speed_table(result: BenchResult, task: str, scaling: str) -> Table:
    """The rows of one task and one kind of scaling, the baseline at 1x first."""
    rows = result.tasks[task].rows_of(scaling)
    one = rows[0].batch_size
    batch = f"{one} images on each device" if scaling == "weak" else f"{one} images over all devices"
    simulated = " — CPU stand-ins, no GPU figure" if result.simulated else ""
    label = f" — {result.label}" if result.label else ""
    return Table(
        title=f"{task}, {scaling} scaling ({batch}){simulated}{label}",
        columns=_COLUMNS,
        rows=[_cells(row) for row in rows],
        notes=result.tasks[task].limits[scaling],
    )


def _cells(row: RowResult) -> list[str]:
    marks = {True: "= single", False: "DIFFERENT", None: "–"}
    one = row.backend == "baseline"
    return [
        row.name,
        str(row.batch_size),
        _spread(row.images_per_s, ".1f"),
        _spread(row.step_ms, ".0f"),
        "1x" if one else _spread(row.speedup, ".2f", "x"),
        "100%" if one else f"{100 * row.efficiency:.0f}%",
        phase_shares(row, most=4),
        marks[row.equal],
    ]


def _spread(value: Spread, form: str, unit: str = "") -> str:
    median, low, high = (format(number, form) for number in (value.median, value.min, value.max))
    return f"{median}{unit}" if value.min == value.max else f"{median}{unit} ({low}–{high})"


def to_markdown(table: Table) -> str:
    """The table in Markdown, its notes below."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(table.columns, *table.rows, strict=True)]
    lines = [_line(table.columns, widths), "|" + "|".join("-" * (width + 2) for width in widths) + "|"]
    lines += [_line(row, widths) for row in table.rows]
    return "\n".join([f"### {table.title}", "", *lines, "", *(f"- {note}" for note in table.notes)])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cell.replace("|", "\\|").ljust(width) for cell, width in zip(cells, widths, strict=True)]
    return "| " + " | ".join(padded) + " |"
