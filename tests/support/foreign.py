"""Somebody else's packages that have the names of ours."""

import os
import subprocess
from pathlib import Path

from tests.support.processes import PUSHPULL


def add_foreign_packages(folder: Path) -> None:
    """Put packages into ``folder`` that must not be imported."""
    for name in ("cluster", "launch", "models", "paramserver", "workers"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f'raise RuntimeError("the foreign {name} was imported")\n')


def pushpull_in(folder: Path, *arguments: str, pythonpath: str = "") -> "subprocess.CompletedProcess[str]":
    """Run ``pushpull`` as a user does who stands in ``folder``."""
    environment = {**os.environ, "PYTHONPATH": pythonpath}
    return subprocess.run(
        [PUSHPULL, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=110
    )
