"""Running test bodies in real torchrun ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_ddp_cases(folder: Path, ranks: int, cases: list[dict[str, Any]], timeout_s: float = 110.0) -> list[Any]:
    """Run training cases in one process group; gives what each returned."""
    (folder / "cases.json").write_text(json.dumps(cases))
    results = folder / "results.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["--log-dir", str(folder / "torchrun")]  # it would leave a folder of its own behind
    command += [str(ROOT / "tests/support/ddp_cases.py"), str(folder / "cases.json"), str(results)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[Any] = json.loads(results.read_text())
    return found
