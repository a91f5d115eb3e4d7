"""A run on disk: ``OUT/NAME/`` and the files in it."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from launch.config import RunConfig
from paramserver.errors import CheckpointError, ConfigError, PushPullError
from workers.checkpoint import list_checkpoints, step_of, sweep_checkpoints

__all__ = ["AUTO", "RunFolder", "read_json", "write_json"]

AUTO = "auto"
"""``--resume auto``: go on in the run's own folder, if there is something to go on from."""


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically: readers see the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=True) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise PushPullError(f"{path} cannot be written ({error.strerror}): is the disk full?") from error


def read_json(path: Path) -> Any:
    """Read a JSON file of a run.

    Raises:
        CheckpointError: if it is missing or broken.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


class RunFolder:
    """The folder of one run; made by ``create``, or opened as it is.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"

    @classmethod
    def choose(cls, config: RunConfig) -> "RunFolder":
        """The folder that a run will have; nothing is written.

        Raises:
            ConfigError: if it exists already and is neither resumed nor overwritten, or cannot be written.
        """
        out = Path(config.out).expanduser()
        if config.name is None and config.resume is not None and config.resume != AUTO:
            path = cls.of_checkpoint(Path(config.resume)).path
        else:
            path = out / (config.name or cls._default_name(config))
        _check_writable(path)
        folder = cls(path)
        if path.exists() and not (config.overwrite or folder._is_resumed(config)):
            raise ConfigError(f"{path} exists: choose another --name, or say --overwrite or --resume {path}")
        if path.exists() and not folder._is_resumed(config) and any(path.iterdir()):
            cls._check_is_run(path)
        return folder

    def _is_resumed(self, config: RunConfig) -> bool:
        """Whether the run goes on in this very folder, instead of taking another run's checkpoint."""
        return config.resume is not None and self.source(config).path.resolve() == self.path.resolve()

    def source(self, config: RunConfig) -> "RunFolder":
        """The folder of the run that is gone on from."""
        return self if config.resume in (None, AUTO) else self.of_checkpoint(Path(str(config.resume)))

    @staticmethod
    def _default_name(config: RunConfig) -> str:
        task = config.task.rpartition(":")[2] if ":" in config.task else config.task
        return f"{task}-{config.backend}-{time.strftime('%Y%m%d-%H%M%S')}"

    @staticmethod
    def _check_is_run(path: Path) -> None:
        if not (path / "config.yaml").exists():
            raise ConfigError(f"--overwrite: {path} is not a run folder (it has no config.yaml), so it stays")

    @classmethod
    def of_checkpoint(cls, path: Path) -> "RunFolder":
        """The run folder that ``--resume PATH`` belongs to: PATH itself, or the folder above its checkpoints."""
        path = path.expanduser()
        return cls(path.parent.parent if path.parent.name == "checkpoints" else path)

    def create(self, config: RunConfig) -> None:
        """Make the folder and write config.yaml; an old one is removed if it is to be overwritten."""
        if self.path.exists() and config.overwrite and not self._is_resumed(config):
            shutil.rmtree(self.path)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        sweep_checkpoints(self.checkpoints)
        # What belongs to this call, not to the run, is left out, so that running the file again repeats the run.
        of_this_call = ("resume", "overwrite", "dry_run", "download")
        settings = {name: value for name, value in config.to_dict().items() if name not in of_this_call}
        settings["name"] = self.path.name
        (self.path / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")

    def read_config(self) -> RunConfig:
        """The settings in config.yaml.

        Raises:
            ConfigError: if there is no such file, or it is not of a run.
        """
        path = self.path / "config.yaml"
        try:
            return RunConfig(**yaml.safe_load(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ConfigError(f"{self.path} is not a run folder: it has no config.yaml") from error
        except (TypeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path} is not the configuration of a run: {error}") from error

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Add a line to a JSONL file and flush it."""
        path = self.path / name
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise PushPullError(f"{path} cannot be written ({error.strerror}): is the disk full?") from error

    def rows(self, name: str) -> Iterator[dict[str, Any]]:
        """Rows of a JSONL file; a torn last line is left out."""
        path = self.path / name
        if not path.exists():
            return
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                return

    def cut_back(self, step: int, source: "RunFolder") -> None:
        """Keep ledger and metrics up to ``step``, taken from the run that is resumed (which may be this one).

        Later checkpoints of this folder go: they belong to steps that are about to be taken again.
        """
        for later in list_checkpoints(self.checkpoints):
            if step_of(later) > step:
                shutil.rmtree(later)
        for name in ("metrics.jsonl", "ledger.jsonl", "evaluations.jsonl"):
            kept = [row for row in source.rows(name) if row["step"] <= step]
            temporary = self.path / f".{name}.{os.getpid()}"
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
            os.replace(temporary, self.path / name)

    def write(self, name: str, value: Any) -> None:
        """Replace a JSON file of the folder."""
        write_json(self.path / name, value)


def _check_writable(path: Path) -> None:
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise ConfigError(f"--out: {existing} is not a folder: choose another place")
    probe = existing / f".pushpull-{os.getpid()}"
    try:
        probe.touch()  # os.access would say yes to root on a read-only file system
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--out: cannot write to {existing} ({error.strerror}): choose another place") from error
