"""Reading a scenario of faults."""

from pathlib import Path
from typing import Any

import yaml

from paramserver.errors import ConfigError
from workers.faults import NO_FAULTS, Fault, Faults

__all__ = ["read_faults"]

_EXAMPLE = "- kill: {role: worker, index: 1, step: 3, stage: push}"
_NAMES = {name: name for name in ("role", "step", "stage", "seconds", "workers")} | {"index": "number"}


def read_faults(path: str | None, folder: Path) -> Faults:
    """The scenario in a YAML file: a list of ``{kind: {role, index, step, stage}}``.

    ``delay`` has ``seconds`` beside, and ``scale: {workers, step}`` changes how many workers there are after a step.

    Args:
        path: of the file; None: nothing happens.
        folder: of the run.

    Raises:
        ConfigError: naming the entry that is wrong.
    """
    if path is None:
        return NO_FAULTS
    try:
        entries = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--faults {path} cannot be read: {error}") from error
    if not isinstance(entries, list):
        raise ConfigError(f"--faults {path} is not a list of faults such as '{_EXAMPLE}'")
    return Faults(tuple(_fault(index, entry) for index, entry in enumerate(entries)), str(folder.resolve()))


def _fault(index: int, entry: Any) -> Fault:
    if not isinstance(entry, dict) or len(entry) != 1:
        raise ConfigError(f"--faults entry {index + 1} is not like '{_EXAMPLE}'")
    ((kind, about),) = entry.items()
    fields = dict(about) if isinstance(about, dict) else {}
    if kind == "scale":
        fields = {"role": "worker", "stage": "commit", **fields}
    if unknown := sorted(fields.keys() - _NAMES.keys()):
        raise ConfigError(f"--faults entry {index + 1}: {', '.join(unknown)} is not known: use {', '.join(_NAMES)}")
    values = {"number": 0, **{_NAMES[name]: value for name, value in fields.items()}}
    if missing := [name for name in ("role", "step", "stage") if name not in values]:
        raise ConfigError(f"--faults entry {index + 1} lacks {', '.join(missing)}: '{_EXAMPLE}'")
    try:
        return Fault(index, kind, **values)
    except TypeError as error:
        raise ConfigError(f"--faults entry {index + 1}: a value has the wrong type ({error})") from error
