"""The pictures of a benchmark: speedup over workers, and where the time of a step goes."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from launch.bench_result import BenchResult, RowResult, TaskResult
from workers.timing import PHASES

__all__ = ["plot_phases", "plot_speedup", "write_plots"]

_BACKEND_COLOURS = {"baseline": "#777777", "single": "#8c6bb1", "ps": "#1f6fb4", "ddp": "#e07b39"}
_PHASE_COLOURS = dict(
    zip(
        PHASES,
        ("#c9b458", "#8cc5e3", "#3b6ea5", "#7fb98a", "#f0a35e", "#d9605a", "#9a7fc2", "#8d8d8d"),
        strict=True,
    )
)
_DPI = 130


def write_plots(result: BenchResult, folder: Path) -> dict[str, list[Path]]:
    """Two PNG files for each task, by task."""
    made = {}
    for name, task in result.tasks.items():
        remark = " — CPU stand-ins, no GPU figure" if result.simulated else ""
        remark += f" — {result.label}" if result.label else ""
        made[name] = [folder / f"{name}-speedup.png", folder / f"{name}-phases.png"]
        for path, figure in zip(
            made[name], (plot_speedup(name, task, remark), plot_phases(name, task, remark)), strict=True
        ):
            FigureCanvasAgg(figure).print_figure(str(path), dpi=_DPI, facecolor="white")
    return made


def plot_speedup(name: str, task: TaskResult, remark: str) -> Figure:
    """Speedup over the number of workers with the ideal line; a bar from the smallest to the largest repeat."""
    figure, panels = _panels(task, height=3.6)
    figure.suptitle(f"{name}: speedup over the single-device baseline{remark}", fontsize=10)
    for scaling, axes in panels.items():
        rows = task.rows_of(scaling)[1:]
        counts = sorted({row.workers for row in rows})
        top = max(counts)
        axes.plot([0, top + 0.5], [0, top + 0.5], "--", color="#999999", linewidth=1, label="ideal")
        axes.plot([1], [1], "D", color=_BACKEND_COLOURS["baseline"], markersize=6, label="baseline")
        backends = list(dict.fromkeys(row.backend for row in rows))
        for place, backend in enumerate(backends):
            own = sorted((row for row in rows if row.backend == backend), key=lambda row: row.workers)
            shift = 0.03 * (place - (len(backends) - 1) / 2)  # points on top of each other cannot be told apart
            _points(axes, own, backend, shift)
        _label(axes, scaling, xlabel="workers", ylabel="speedup", xticks=counts)
        axes.set_xlim(0.5, top + 0.5)
        axes.set_ylim(0, max(top, *(row.speedup.max for row in rows)) + 0.4)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, loc="upper left", frameon=False)
    return figure


def _points(axes: Any, rows: list[RowResult], backend: str, shift: float) -> None:
    medians = [row.speedup.median for row in rows]
    below = [row.speedup.median - row.speedup.min for row in rows]
    above = [row.speedup.max - row.speedup.median for row in rows]
    axes.errorbar(
        [row.workers + shift for row in rows],
        medians,
        yerr=[below, above],
        marker="o",
        markersize=5,
        capsize=3,
        color=_BACKEND_COLOURS.get(backend, "#333333"),
        label=backend,
    )


def plot_phases(name: str, task: TaskResult, remark: str) -> Figure:
    """Milliseconds of a step by stage, one bar a row."""
    most = max(len(task.rows_of(scaling)) for scaling in task.limits)
    figure, panels = _panels(task, height=1.6 + 0.42 * most)
    figure.suptitle(f"{name}: where the time of a step goes{remark}", fontsize=10)
    for scaling, axes in panels.items():
        rows = task.rows_of(scaling)
        left = [0.0] * len(rows)
        for phase in PHASES:
            widths = [row.phases_ms[phase] for row in rows]
            axes.barh(range(len(rows)), widths, left=left, color=_PHASE_COLOURS[phase], label=phase, height=0.7)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        _label(axes, scaling, xlabel="ms per step", yticks=range(len(rows)))
        axes.set_xlim(0, 1.04 * max(left))
        axes.set_yticklabels([f"{row.name}\n({row.batch_size} images)" for row in rows], fontsize=8)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
    handles, labels = next(iter(panels.values())).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(PHASES), fontsize=8, frameon=False)
    return figure


def _label(axes: Any, scaling: str, **settings: Any) -> None:
    axes.set(**settings)
    axes.set_title(f"{scaling} scaling", fontsize=10)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _panels(task: TaskResult, height: float) -> tuple[Figure, dict[str, Any]]:
    """A figure with one pair of axes for each kind of scaling."""
    scalings = list(task.limits)
    figure = Figure(figsize=(5.2 * len(scalings) + 1.0 * (len(scalings) == 1), height), layout="constrained")
    return figure, dict(zip(scalings, figure.subplots(1, len(scalings), squeeze=False)[0], strict=True))
