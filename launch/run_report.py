"""``pushpull report``: a run's curves, metrics and predictions on a page that needs no other file."""

import math
import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from launch.predict import compare_with_truth
from launch.report import data_uri, page
from launch.run_folder import RunFolder, read_json
from launch.trained import Trained, open_trained
from models.errors import DataError
from models.pictures import beside, contact_sheet, encode_image
from models.task import Drawable, Showable
from paramserver.errors import ConfigError
from workers.checkpoint import list_checkpoints

__all__ = ["plot_curves", "write_run_report"]

_DPI = 120
_SIDE = 480
_COLUMNS = 2
_SUMMARY = (
    "task",
    "model",
    "data",
    "backend",
    "workers",
    "servers",
    "steps",
    "images_per_s",
    "fingerprint",
    "state_fingerprint",
)
_MOST_CURVES = 6


def write_run_report(run: str, *, number: int, threads: int | None) -> Path:
    """Write ``report.html`` into a run's folder.

    Args:
        run: the folder, or a checkpoint in it, whose predictions are shown then.
        number: predictions that are shown, of the first images of the validation split, where the task can draw.
        threads: other threads than the run's.

    Returns:
        The page.

    Raises:
        ConfigError: if it is no run folder, or it cannot be written.
        CheckpointError: if there is neither a checkpoint nor a step, or a file is broken.
    """
    run_folder = RunFolder.of_checkpoint(Path(run))
    folder, config = run_folder.path, run_folder.read_config()
    summary = read_json(folder / "summary.json") if (folder / "summary.json").exists() else {}
    losses = [(row["step"], row["loss"]) for row in run_folder.rows("metrics.jsonl")]
    evaluations = list(run_folder.rows("evaluations.jsonl"))
    pictures, step = "", 0
    if list_checkpoints(run_folder.checkpoints) or not losses:  # else it was cut off, and has curves
        trained = open_trained(run, threads=threads)
        pictures, step = _predictions(trained, number, needed=config.evaluate), trained.step
    text = page(
        "run_report.html",
        name=folder.name,
        simulated=summary.get("simulated", config.device == "cpu" or not _gpus(folder)),
        summary=_about({"data": config.data, "model": config.model or "default", **summary}),
        curves=data_uri(_to_png(plot_curves(losses, evaluations))),
        evaluations=_table(evaluations),
        pictures=pictures,
        step=step,
        settings=_settings(run_folder),
    )
    path, temporary = folder / "report.html", folder / f".report.html.{os.getpid()}"
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}): make its folder writable") from error
    return path


def _gpus(folder: Path) -> list[str]:
    """Of the machine that a run was on."""
    return list(read_json(folder / "env.json")["gpus"]) if (folder / "env.json").exists() else []


def _predictions(trained: Trained, number: int, *, needed: bool) -> str:
    """A picture of the first ones; none, if the task draws none, or nothing is there and it is not ``needed``."""
    if not number or not isinstance(trained.task, Showable) or not isinstance(trained.task, Drawable):
        return ""
    try:
        compared = compare_with_truth(trained, number)
    except DataError:
        if needed:
            raise
        return ""
    pairs = [beside(known, predicted) for _, known, predicted in compared]
    return data_uri(encode_image(contact_sheet(pairs, columns=_COLUMNS, side=_SIDE)))


def plot_curves(losses: Sequence[tuple[int, float]], evaluations: Sequence[Mapping[str, float]]) -> Figure:
    """The loss of each step, and beside it the validation metrics, as far as they lie between 0 and 1."""
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([step for step, _ in losses], [loss for _, loss in losses], color="#1f6fb4", linewidth=1)
    left.set(title="training loss", xlabel="step")
    names = [name for name in dict.fromkeys(key for row in evaluations for key in row) if name != "step"]
    # A row may lack a metric whose library was missing then; NaN is nothing yet.
    curves = {name: [row.get(name, math.nan) for row in evaluations] for name in names}
    parts = [name for name, values in curves.items() if not any(value > 1 for value in values)]
    for name in parts[:_MOST_CURVES]:
        right.plot([row["step"] for row in evaluations], curves[name], marker="o", label=name)
    right.set(title="validation", xlabel="step")
    if parts:
        right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _to_png(figure: Figure) -> bytes:
    buffer = BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=_DPI, facecolor="white")
    return buffer.getvalue()


def _about(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [(name.replace("_", " "), _text(summary[name])) for name in _SUMMARY if name in summary]
    percent = summary.get("phases_percent", {})
    if shares := ", ".join(f"{name} {share:.0f}%" for name, share in percent.items() if share >= 1):
        rows.append(("where the time goes", shares))
    return rows


def _table(evaluations: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    columns = list(dict.fromkeys(key for row in evaluations for key in row))
    return {"columns": columns, "rows": [[_text(row.get(name, "")) for name in columns] for row in evaluations]}


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _settings(folder: RunFolder) -> str:
    return (folder.path / "config.yaml").read_text(encoding="utf-8")
