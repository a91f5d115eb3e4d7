"""A disk that is full ends the run with one line, and leaves no half checkpoint."""

import subprocess
from pathlib import Path

import pytest

from tests.support.processes import PUSHPULL

_MOUNT = "mount -t tmpfs -o size=2m none {folder} && {command}; echo code $?; ls -A {folder}/run/checkpoints"
"""In a mount namespace of its own, so that nothing is left of it."""


@pytest.mark.parametrize("backend", ["single", pytest.param("ps", marks=pytest.mark.slow)])
def test_a_disk_that_is_full_ends_the_run_with_one_line(tmp_path: Path, backend: str) -> None:
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces here")
    command = f"{PUSHPULL} train ssd --backend={backend} --image-size=64 --batch-size=4 --steps=4 --checkpoint-every=2"
    script = _MOUNT.format(folder=tmp_path, command=f"{command} --out={tmp_path} --name=run")
    ended = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=100)
    assert ended.stdout.splitlines()[-1] == "code 1", "and no checkpoint, not even a half one"
    (complaint,) = ended.stderr.splitlines()
    assert complaint.startswith(f"pushpull: checkpoint {tmp_path}/run/checkpoints/step_2 cannot be written")
    assert "No space left" in complaint
