"""Body of a torchrun rank in tests: runs one case after the other in one process group, rank 0 writes the results.

Usage: torchrun --nproc-per-node N ddp_cases.py CASES.json RESULTS.json
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from launch.config import RunConfig
from launch.resolve import resolve
from paramserver.fingerprint import fingerprint
from workers.assembly import build_ddp_worker
from workers.checkpoint import load_checkpoint
from workers.process_group import process_group, torchrun_rank


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Train a case; with ``save_to`` one step, from ``from_checkpoint`` if given, whose result is saved as tensors."""
    source, target = case.pop("from_checkpoint", None), case.pop("save_to", None)
    run = resolve(RunConfig(backend="ddp", **case))
    rank = torchrun_rank()
    assert rank is not None
    config, state = replace(run.worker, worker=rank.rank), None
    if source is not None:
        state, _ = load_checkpoint(Path(source))
    if target is not None:
        config = replace(config, plan=replace(config.plan, steps=(state.version if state else 0) + 1))
    worker, backend = build_ddp_worker(run.task, config, run.optimizer, run.servers, lambda: False, state)
    losses = [report.loss for report in worker.run()]
    values = backend.state().state_dict()
    if target is not None and rank.rank == 0:
        torch.save(values, target)
    return {"fingerprint": fingerprint(values), "losses": losses}


def main() -> None:
    cases, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(1)
    with process_group(torch.device("cpu"), 60.0):
        found = [run_case(case) for case in cases]
    rank = torchrun_rank()
    if rank is not None and rank.rank == 0:
        results.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
