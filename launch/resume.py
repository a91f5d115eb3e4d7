"""Which checkpoint a run goes on from: one that is torn is named, and the one before it taken."""

from dataclasses import replace
from pathlib import Path

from launch.downloads import locate_weights
from launch.recorder import checkpoint_meta
from launch.resolve import Resolved
from launch.run_folder import AUTO, RunFolder
from paramserver.errors import CheckpointError, ConfigError
from paramserver.state import State
from workers.assembly import describe
from workers.checkpoint import find_checkpoint, list_checkpoints, load_checkpoint
from workers.weights import fit_weights, read_weights, with_weights

__all__ = ["choose_resume", "newest_intact"]


def choose_resume(resolved: Resolved, folder: RunFolder) -> tuple[State | None, list[str]]:
    """The state to go on from, checked against the run's settings, and what the user should know of it.

    Args:
        resolved: the run.
        folder: its folder, where ``--resume auto`` looks.

    Raises:
        CheckpointError: if there is none that fits.
    """
    resume = resolved.config.resume
    if resume is None:
        return _from_weights(resolved)
    path = folder.path if resume == AUTO else Path(resume).expanduser()
    if resume == AUTO and not list_checkpoints(folder.checkpoints):
        state, notices = _from_weights(resolved)
        return state, [f"{folder.path} has no checkpoint yet: the run begins at its first step", *notices]
    found = find_checkpoint(path)
    if found == path:
        return _checked(found, resolved)
    return newest_intact(path, resolved)


def _from_weights(resolved: Resolved) -> tuple[State | None, list[str]]:
    """The initial state with ``--weights``, if there are any."""
    if (file := resolved.config.weights) is None:
        return None, []
    model, _, state = describe(resolved.task, resolved.worker, resolved.optimizer, resolved.servers)
    aliases = getattr(model, "weight_aliases", {})
    fitted = fit_weights(state.state_dict(), read_weights(locate_weights(file)), aliases)
    if not fitted.values:
        theirs, ours = (", ".join(names[:3]) for names in (fitted.unused + fitted.reshaped, fitted.missing))
        raise ConfigError(
            f"--weights {file}: none of its keys ({theirs}, …) fits the model's ({ours}, …): is it another network's?"
        )
    for key, value in fitted.values.items():
        if not value.isfinite().all():
            raise ConfigError(f"--weights {file}: {key} holds what is not finite: whatever trained it had diverged")
    return with_weights(state, fitted), [f"weights   {file}: {fitted.describe()}"]


def newest_intact(path: Path, resolved: Resolved) -> tuple[State, list[str]]:
    """The newest checkpoint of a run folder that can be gone on from, and a notice for each that cannot.

    Raises:
        CheckpointError: that of the newest, if there is none.
    """
    first: CheckpointError | None = None
    refused: list[str] = []
    for checkpoint in list_checkpoints(path / "checkpoints"):
        try:
            state, notices = _checked(checkpoint, resolved)
        except CheckpointError as error:
            first = first or error
            refused.append(f"{error}; the one before it is taken")
        else:
            return state, [*refused, *notices]
    raise first or CheckpointError(f"{path}: no checkpoint there")


def _checked(path: Path, resolved: Resolved) -> tuple[State, list[str]]:
    state, meta = load_checkpoint(path)
    for name, value in checkpoint_meta(resolved).items():
        if meta.get(name) != value:
            raise CheckpointError(
                f"--resume {path}: it was written with {name} {meta.get(name)}, this run has {value}: "
                "the same bits need the same settings (running its config.yaml gives them)"
            )
    if state.version >= resolved.worker.plan.steps:
        raise CheckpointError(
            f"--resume {path}: it has {state.version} steps already, and the run ends at "
            f"{resolved.worker.plan.steps}: raise --steps or --epochs"
        )
    before, now = meta.get("wire_precision"), resolved.config.wire_precision
    notices = [f"goes on from {path}"]
    if state.residuals and before != now:
        notices.append(f"residuals in the checkpoint are dropped: it has --wire-precision {before}, this run has {now}")
        state = replace(state, residuals={})
    return state, notices
