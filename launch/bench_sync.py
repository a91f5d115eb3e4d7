"""``pushpull bench sync``: the time of one round, push to pull, beside DDP's, Ray's example's and the memory's."""

import json
import os
import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.session import ray_session
from launch.drivers import idle_cores
from launch.environment import environment
from launch.resolve import usage_errors
from launch.sync_config import SyncConfig
from models.options import TaskOptions
from models.registry import read_task
from paramserver.config import OptimizerConfig, ServerConfig

__all__ = ["bench_sync"]

_MIB = 1 << 20
_NAMES = {
    "ours": "PushPull: push, sum, SGD, pull",
    "ddp": "DDP over gloo, and SGD on each rank",
    "ray_example": "Ray's documented parameter server",
    "limit": "memory limit: one thread, one pass",
}


def bench_sync(config: SyncConfig) -> int:
    """Measure and print; gives the exit code.

    Raises:
        ConfigError: if the parameters are unknown, or there is no room for them.
    """
    with usage_errors():
        source = read_task(config.params) if config.megabytes is None else None
    optimizer = OptimizerConfig(lr=0.01, momentum=config.momentum, weight_decay=config.weight_decay)
    # Ray's example moves its tensors through the object store: a few rounds of them must fit.
    store = int(20 * _MIB * (config.workers + 1) * max(10, config.megabytes or 0))
    actors = config.workers + config.servers + 1
    with ray_session(address=None, num_cpus=actors, num_gpus=0, store_bytes=min(store, 8192 * _MIB)):
        from cluster.round_actors import RoundConfig
        from cluster.round_bench import measure_rounds

        times = measure_rounds(
            RoundConfig(
                source=source,
                options=TaskOptions(data="synthetic") if source else None,
                megabytes=config.megabytes or 0.0,
                workers=config.workers,
                optimizer=optimizer,
                servers=ServerConfig(num_servers=config.servers, slice_bytes=config.slice_bytes),
                server_threads=config.server_threads or idle_cores(config.workers, config.servers),
                rounds=config.rounds,
                transport=config.transport,
                arena_dir=config.arena_dir,
            )
        )
    result = _summary(config, times)
    if config.json:
        print(json.dumps(result, indent=2))
    else:
        _print_table(config, result)
    return 0


def _summary(config: SyncConfig, times: Any) -> dict[str, Any]:
    result: dict[str, Any] = {"command": config.command(), "params": config.params, "workers": config.workers}
    result |= {"servers": config.servers, "rounds": len(times.ours), "parameter_bytes": times.parameter_bytes}
    for name in _NAMES:
        values = getattr(times, name)
        result[f"{name}_ms"] = statistics.median(values)
        result[f"{name}_ms_min"], result[f"{name}_ms_max"] = min(values), max(values)
    for name in ("ddp", "ray_example", "limit"):
        result[f"ours/{name}"] = result["ours_ms"] / result[f"{name}_ms"]
    result["backward_ms"], result["fill_ms"] = statistics.median(times.backward), statistics.median(times.fill)
    result["server_ms"] = dict(times.server_ms)
    result["arena_bytes"] = times.arena_bytes
    result["environment"] = environment()
    return result


def _print_table(config: SyncConfig, result: dict[str, Any]) -> None:
    megabytes = result["parameter_bytes"] / 1e6
    table = Table(title=f"one round, {config.workers} workers, {config.servers} server(s), {megabytes:.1f} MB (fp32)")
    for column in ("", "median ms", "min", "max", "ours / it"):
        table.add_column(column, justify="left" if not column else "right")
    for name, about in _NAMES.items():
        ratio = result.get(f"ours/{name}")
        values = [f"{result[f'{name}_ms{suffix}']:.2f}" for suffix in ("", "_min", "_max")]
        table.add_row(about, *values, "" if ratio is None else f"{ratio:.2f}")
    console = Console()
    console.print(table)
    busy = ", ".join(f"{stage} {value:.1f} ms" for stage, value in result["server_ms"].items())
    console.print(f"servers busy in the last round: {busy}; arenas {result['arena_bytes'] / 1e6:.1f} MB")
    console.print(
        f"interleaved on {os.cpu_count()} CPU cores, which stand in for devices. Taken off: a backward that only hands "
        f"out gradients, {result['backward_ms']:.2f} ms, or leaves them in our arena, {result['fill_ms']:.2f} ms. "
        f"Again: {result['command']}"
    )
