"""Sentences that say what limits a speedup, computed from the times of the stages."""

from collections.abc import Sequence

from launch.bench_result import RowResult

__all__ = ["explain", "phase_shares"]

_MEANING = {
    "split": "waiting for samples",
    "pull": "getting the parameters",
    "reduce": "copying and adding gradients on the device",
    "push": "handing gradients over",
    "aggregate": "waiting for other workers and for the sums",
    "update": "the optimizer",
    "commit": "making the new version visible",
}
_NOTEWORTHY = 0.01  # of the step


def phase_shares(row: RowResult, most: int = 8) -> str:
    """The largest stages with at least one per cent of the step, largest first: ``compute 91%, aggregate 4%``."""
    total = sum(row.phases_ms.values()) or 1.0
    largest = sorted(row.phases_ms.items(), key=lambda item: -item[1])[:most]
    return ", ".join(f"{name} {100 * ms / total:.0f}%" for name, ms in largest if ms / total >= _NOTEWORTHY)


def explain(rows: Sequence[RowResult], *, servers: int, cores: int | None) -> list[str]:
    """What limits each backend at its largest number of workers.

    Args:
        rows: of one kind of scaling, the baseline first.
        servers: parameter servers of a ``ps`` row.
        cores: CPU cores of the machine if they stand in for GPUs, else None.
    """
    baseline, *others = rows
    largest = {row.backend: row for row in sorted(others, key=lambda row: row.workers)}
    return [
        _explain(row, baseline, servers=servers if row.backend == "ps" else 0, cores=cores) for row in largest.values()
    ]


def _explain(row: RowResult, baseline: RowResult, *, servers: int, cores: int | None) -> str:
    # Every stage of the baseline, scaled to the images that one device has here: the time with nothing lost.
    scale = row.batch_size / row.workers / baseline.batch_size
    ideal_ms = scale * baseline.step_ms.median
    lost_ms = {name: ms - scale * baseline.phases_ms[name] for name, ms in row.phases_ms.items()}
    who = row.name.replace(", ", " with ")
    text = f"{who} spends {_spent(row)}. A step takes {row.step_ms.median:.0f} ms, and would take {ideal_ms:.0f} ms "
    text += f"at a speedup of {row.workers}: "
    compute = _compute_change(row, scale * baseline.phases_ms["compute"], cores)
    added = sorted(
        ((name, ms) for name, ms in lost_ms.items() if name != "compute" and ms > _NOTEWORTHY * row.step_ms.median),
        key=lambda item: -item[1],
    )
    parts = [compute, *(f"{name} adds {ms:.0f} ms" for name, ms in added[:4])]
    text += "; ".join(parts) + "."
    if cores is not None and row.workers > 1 and row.workers + servers > cores:
        also = f" and {servers} server{'s' * (servers > 1)}" if servers else ""
        text += f" {row.workers} workers{also} share {cores} core{'s' * (cores > 1)}."
    return text


def _spent(row: RowResult) -> str:
    total = sum(row.phases_ms.values()) or 1.0
    compute, *others = sorted(row.phases_ms.items(), key=lambda item: (item[0] != "compute", -item[1]))
    parts = [f"{100 * compute[1] / total:.0f}% of a step computing"]
    parts += [f"{100 * ms / total:.0f}% in {name} ({_MEANING[name]})" for name, ms in others if ms / total >= 0.02]
    return ", ".join(parts[:4])


def _compute_change(row: RowResult, ideal_ms: float, cores: int | None) -> str:
    """How compute itself compares with the baseline's for the same number of images."""
    own_ms = row.phases_ms["compute"]
    change = own_ms / ideal_ms - 1 if ideal_ms else 0.0
    if abs(change) < _NOTEWORTHY:
        return "compute itself is as fast as in the baseline"
    if change < 0:
        return f"compute itself is {-100 * change:.0f}% faster for each image than in the baseline"
    causes = []
    if row.workers > 1 and cores is not None:
        causes.append("cores share caches and memory bandwidth")
    if row.scaling == "strong" and row.workers > 1:
        causes.append("a device is less efficient on fewer images at a time")
    why = f" ({'; '.join(causes)})" if causes else ""
    return f"compute itself is {100 * change:.0f}% slower for each image than in the baseline{why}"
