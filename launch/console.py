"""What a run says on the terminal: one block at the start, one line a step, one block at the end."""

import sys
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from launch.resolve import Resolved
from paramserver.reduction import maximal_nodes
from workers.minibatch import deal_runs
from workers.report import EvaluationReport, StepReport

__all__ = ["RunConsole", "as_note", "start_block"]


def start_block(run: Resolved) -> str:
    """What is about to run, with everything that changes its result or its speed."""
    config, plan = run.config, run.worker.plan
    device = "GPU" if run.worker.device == "cuda" else "CPU core (simulated: it stands in for a GPU)"
    threads = "" if run.worker.device == "cuda" else f", {config.threads} thread(s) each; --threads raises it"
    dealt = deal_runs(plan.microbatches, run.worker.num_workers)
    by_worker = "+".join(str(len(part)) for part in dealt)
    ghost = plan.batch_size / plan.microbatches
    rate = f"{config.lr:g} {config.schedule}" + (
        f", {config.warmup_steps} warm-up steps" if config.warmup_steps else ""
    )
    servers = f", {config.servers} server(s)" if config.backend == "ps" else ""
    computes = [config.precision, *["channels_last"] * config.channels_last, *["compiled"] * config.compile]
    lines = [
        f"task      {run.task.name} on {config.data} ({run.num_samples} training images)",
        f"backend   {config.backend}, {run.worker.num_workers} worker(s){servers}",
        f"device    {device}{threads}; {', '.join(computes)}",
        f"minibatch {plan.batch_size} over all workers, M = {plan.microbatches} microbatches ({by_worker} by worker); "
        f"batch norm sees {ghost:g} images at a time",
        f"optimizer {config.optimizer}, lr {rate} (not rescaled by workers), momentum {config.momentum:g}, "
        f"weight decay {config.weight_decay:g}",
        f"steps     {plan.steps}, seed {plan.seed}",
    ]
    nodes = [len(maximal_nodes(part.start, part.stop, plan.microbatches)) for part in dealt]
    if config.backend == "ps" and max(nodes) > 1:
        lines.append(as_note(f"workers push {nodes} tree nodes a step: it is 1 where M / workers is a power of two"))
    if config.early_forward and not (run.worker.early_forward and config.backend == "ps" and config.transport != "ray"):
        lines.append(
            as_note(
                "--early-forward does nothing here: it is for ps in shared memory on x86, without clipping or skipping"
            )
        )
    if config.wire_precision != "fp32":
        lines.append(
            f"wire      {config.wire_precision} with error feedback where sums go through Ray: that N workers equal "
            "one, or a killed run one that nobody killed, is not claimed"
        )
    return "\n".join(lines)


def as_note(text: str) -> str:
    """A line of the start block that the user should know of."""
    return f"note      {text}"


class RunConsole:
    """Lines of one run; a progress bar with one live line on a terminal, plain lines otherwise.

    Args:
        total: steps of the run.
        first: steps that were done before.
        quiet: say nothing.
    """

    def __init__(self, total: int, first: int, *, quiet: bool) -> None:
        self._total = total
        self._quiet = quiet
        self._progress: Progress | None = None
        if not quiet and sys.stdout.isatty():
            columns = (MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._progress = Progress(*columns, console=Console())
            self._bar = self._progress.add_task("starting", total=total, completed=first)
            self._progress.start()

    def say(self, text: str) -> None:
        """Print a line or a block."""
        if self._progress is not None:
            self._progress.console.print(text, highlight=False, markup=False)
        elif not self._quiet:
            print(text, flush=True)

    def step(self, report: StepReport, images_per_s: float) -> None:
        """Show a committed step."""
        dropped = ", dropped: gradient not finite" if report.commit.skipped else ""
        values = f"loss {report.loss:.4f}, {images_per_s:.1f} images/s, {report.step_ms:.0f} ms: "
        line = values + phase_shares(report.phases_ms) + dropped
        if self._progress is not None:
            self._progress.update(self._bar, completed=report.step, description=line)
        else:
            self.say(f"step {report.step}/{self._total}, epoch {report.epoch + 1}, {line}")

    def evaluation(self, report: EvaluationReport, values: Mapping[str, float]) -> None:
        """Show an evaluation."""
        shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        self.say(f"validation after step {report.step}: {shown} ({report.seconds:.1f} s)")

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._progress is not None:
            self._progress.stop()


def phase_shares(phases_ms: Mapping[str, float]) -> str:
    """Stages with at least one per cent of the time, in their order."""
    total = sum(phases_ms.values()) or 1.0
    shares = {name: 100 * value / total for name, value in phases_ms.items()}
    return " ".join(f"{name} {share:.0f}%" for name, share in shares.items() if share >= 1)
