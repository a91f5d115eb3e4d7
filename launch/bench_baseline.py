"""The baseline in a process of its own, as every worker has one: ``python -m launch.bench_baseline RUN OUT``."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from launch.config import RunConfig
from launch.run_folder import read_json, write_json
from paramserver.errors import PushPullError

__all__ = ["main", "run_baseline"]

_TIMEOUT_S = 3600.0


def run_baseline(config: RunConfig) -> list[dict[str, float]]:
    """Milliseconds by stage of each step of the plain torch loop.

    Raises:
        PushPullError: if its process failed.
    """
    with tempfile.TemporaryDirectory(prefix="pushpull-") as temporary:
        settings, result = Path(temporary) / "run.json", Path(temporary) / "steps.json"
        write_json(settings, config.to_dict())
        # -P: the working directory may hold somebody else's launch/ or models/.
        command = [sys.executable, "-P", "-m", "launch.bench_baseline", str(settings), str(result)]
        process = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        if process.returncode:
            tail = " | ".join(line.strip() for line in process.stderr.splitlines()[-3:])
            raise PushPullError(f"the baseline of {config.task} ended with {process.returncode}: {tail}")
        steps: list[dict[str, float]] = read_json(result)
        return steps


def main(arguments: list[str]) -> None:
    """Train in this process; the child's side of ``run_baseline``."""
    from launch.resolve import resolve
    from workers.baseline import train_baseline

    settings, result = map(Path, arguments)
    run = resolve(RunConfig(**json.loads(settings.read_text(encoding="utf-8"))))
    write_json(result, train_baseline(run.task, run.worker, run.optimizer))


if __name__ == "__main__":
    main(sys.argv[1:])
