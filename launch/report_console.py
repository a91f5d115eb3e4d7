"""A benchmark on the terminal, as it goes on: tables drawn by rich on a terminal, Markdown otherwise."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from launch.bench_result import BenchResult, Equality
from launch.report_tables import Table, header_lines, speed_table, to_markdown

__all__ = ["ReportConsole", "equality_heading"]


class ReportConsole:
    """Shows each part as soon as it is known.

    Args:
        result: filled while the benchmark goes on.
    """

    def __init__(self, result: BenchResult) -> None:
        self._result = result
        self._console = Console() if sys.stdout.isatty() else None

    def header(self) -> None:
        """What is measured on what."""
        label = f" ({self._result.label})" if self._result.label else ""
        print("\n".join([f"benchmark {self._result.name}{label}", *header_lines(self._result)]), flush=True)

    def equality(self, task: str, checks: Sequence[Equality]) -> None:
        """Equality stands above the speed."""
        print(f"\n## {task}\n\n{equality_heading(self._result, checks)}\n", flush=True)
        for check in checks:
            print(f"- {check.sentence}", flush=True)

    def speed(self, task: str) -> None:
        """The tables of one task."""
        for scaling in self._result.tasks[task].limits:
            self._table(speed_table(self._result, task, scaling))

    def _table(self, table: Table) -> None:
        if self._console is None:
            print("\n" + to_markdown(table), flush=True)
            return
        drawn = RichTable(title=table.title, title_justify="left", title_style="bold")
        for column in table.columns:
            drawn.add_column(column, justify="left" if column in ("", "where the time goes", "bits") else "right")
        for row in table.rows:
            drawn.add_row(*(Text(cell) for cell in row))
        self._console.print()
        self._console.print(drawn)
        for note in table.notes:
            self._console.print(f"- {note}", markup=False, highlight=False)

    def stopped(self) -> None:
        """Why there is no report."""
        print("stopped: rows are missing, so nothing was written", file=sys.stderr, flush=True)

    def end(self, folder: Path) -> None:
        """Where everything is."""
        print(f"\nall in {folder}: report.html, bench.md, bench.json", flush=True)


def equality_heading(result: BenchResult, checks: Sequence[Equality]) -> str:
    """What was compared."""
    steps = result.config["equality_steps"]
    return (
        f"Equality after {steps} step{'s' * (steps > 1)} from the same start, to the bit:"
        if checks
        else "Equality: not checked."
    )
