"""Joining a cluster that somebody else started."""

import json
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import end_processes_of, start
from tests.support.runs import HARD, SMALL, train


@pytest.fixture
def head(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A Ray head with a token of its own, on loopback."""
    folder = tmp_path_factory.mktemp("ray", numbered=True)
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    ray = str(Path(sys.executable).with_name("ray"))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [ray, "start", "--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=4"]
    home = Path(tempfile.mkdtemp(prefix="pp-"))  # a socket's path may have about 108 bytes: pytest's are too long
    command += ["--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={home}"]
    started = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert started.returncode == 0, started.stderr
    yield f"127.0.0.1:{port}"
    end_processes_of({str(home)})  # "ray stop" would end every cluster of this machine
    shutil.rmtree(home, ignore_errors=True)


def test_a_run_on_a_joined_cluster_has_the_bits_of_single(head: str, tmp_path: Path) -> None:
    """In a process of its own: Ray reads a token once, and this one may have used another."""
    settings = {**SMALL["ssd"], **HARD, "steps": 2}
    options = [f"--{key.replace('_', '-')}={str(value).lower()}" for key, value in settings.items() if key != "task"]
    options += ["--backend=ps", "--workers=2", f"--address={head}", f"--out={tmp_path}", "--name=ps"]
    process = start("train", "ssd", *options)
    _, complaint = process.communicate(timeout=90)
    assert process.returncode == 0, complaint
    joined = json.loads((tmp_path / "ps" / "summary.json").read_text())
    single = train(tmp_path, "single", backend="single", **settings)
    assert joined["fingerprint"] == single.summary["fingerprint"]
