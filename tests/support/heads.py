"""Ray clusters that somebody else has started, of several nodes on this machine; import ``start_head`` as a fixture."""

import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.processes import end_processes_of

__all__ = ["StartHead", "ray_start", "start_head"]

StartHead = Callable[[int], str]


def ray_start(*options: str) -> None:
    """``ray start`` on this machine."""
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "start", "--node-ip-address=127.0.0.1", "--disable-usage-stats", *options]
    started = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert started.returncode == 0, started.stderr


@pytest.fixture
def start_head(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[StartHead]:
    """Starts a Ray head with so many CPUs and a token of its own; gives its address."""
    folder = tmp_path_factory.mktemp("ray", numbered=True)
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")  # with "0" a second node is refused
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    home = Path(tempfile.mkdtemp(prefix="pp-"))  # a socket's path may have about 108 bytes: pytest's are too long

    def start_it(num_cpus: int) -> str:
        cpus = f"--num-cpus={num_cpus}"
        ray_start("--head", f"--port={port}", cpus, "--include-dashboard=false", f"--temp-dir={home}")
        return f"127.0.0.1:{port}"

    yield start_it
    end_processes_of({str(home)})  # "ray stop" would end every cluster of this machine
    shutil.rmtree(home, ignore_errors=True)
