"""Starting torchrun for ``--backend ddp`` and making sense of how it ends."""

import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType

import yaml

from launch.config import RunConfig
from launch.run_folder import RunFolder, read_json
from paramserver.errors import CheckpointError, PushPullError, WorkerLost

__all__ = ["run_under_torchrun"]

_GRACE_S = 60.0


def run_under_torchrun(config: RunConfig, folder: RunFolder, *, quiet: bool) -> int:
    """Run ``config`` in ``config.workers`` ranks on this machine; gives the exit code of the run.

    The settings were checked before: torchrun turns a rank's exit code 2, 143 or 130 into 1, so what happened is read
    from the run's status.json.

    Raises:
        PushPullError: what the ranks said went wrong, or that they died without a word.
    """
    with tempfile.TemporaryDirectory(prefix="pushpull-") as temporary:
        settings = Path(temporary) / "config.yaml"
        settings.write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
        script = Path(sys.executable).with_name("pushpull")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command += [str(config.workers), "--max-restarts", str(config.max_restarts)]
        command += ["--log-dir", temporary]  # it would leave a folder of its own behind
        command += ["--no-python", str(script), "train", "--config", str(settings)]
        (folder.path / "status.json").unlink(missing_ok=True)
        # The ranks' own errors stand in status.json: torchrun's table and tracebacks would bury them.
        with tempfile.TemporaryFile(mode="w+") as log:
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL if quiet else None, stderr=log, start_new_session=True
            )
            _wait(process)
            log.seek(0)
            return _outcome(folder, log.read(), process.returncode)


def _wait(process: subprocess.Popen[bytes]) -> None:
    """Wait for torchrun; pass SIGTERM on, and take it along on Ctrl-C."""

    def forward(number: int, _frame: FrameType | None) -> None:
        process.send_signal(number)

    old = signal.signal(signal.SIGTERM, forward)
    try:
        process.wait()
    except BaseException:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
    finally:
        signal.signal(signal.SIGTERM, old)


def _outcome(folder: RunFolder, log: str, code: int) -> int:
    try:
        status = read_json(folder.path / "status.json")
    except CheckpointError:
        tail = " | ".join(line.strip() for line in log.splitlines()[-3:])
        raise WorkerLost(f"torchrun ended with {code} before the run began: {tail}") from None
    if status["state"] == "failed":
        raise PushPullError(status["error"])
    if status["state"] == "running":
        raise WorkerLost(f"a rank died (torchrun ended with {code}); go on with --resume {folder.path}")
    return int(status["exit_code"])
