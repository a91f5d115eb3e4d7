"""The command line: ``pushpull train | bench | data | evaluate | predict | report | diff | …``; ``--help`` is quick."""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

__all__ = ["main"]

_FAILED, _USAGE, _INTERRUPTED = 1, 2, 130
_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("workers", "paramserver", "models", "cluster")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; gives the exit code: 0, 1 (run failed), 2 (usage), 130 (Ctrl-C), 143 (SIGTERM)."""
    foreign = _foreign_package()
    if foreign is not None:
        return _complain(foreign, _USAGE)
    _say_warnings_once()
    from launch.arguments import CHECK, KILL, SHOW, SYNC, build_parser, config_first
    from models.errors import TaskError
    from paramserver.errors import ConfigError, PushPullError

    try:
        parser = build_parser()
        options = parser.parse_args(config_first(sys.argv[1:] if arguments is None else arguments))
        commands: dict[str, Callable[..., int]] = {
            "train": _train,
            "bench": _bench,
            SYNC: _bench_sync,
            KILL: _bench_kill,
            CHECK: _data_check,
            SHOW: _data_show,
            "evaluate": _evaluate,
            "predict": _predict,
            "report": _report,
            "diff": _diff,
            "tasks": _tasks,
            "env": _env,
        }
        command = options.pop("command")
        return commands[command](options[command])
    except ConfigError as error:
        return _complain(error, _USAGE)
    except (PushPullError, TaskError) as error:
        return _complain(error, _FAILED)
    except KeyboardInterrupt:
        return _complain("interrupted", _INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED


def _foreign_package() -> str | None:
    """What is wrong with a package that is not ours; finding it does not import it, as ``workers.install`` would."""
    for name in _PACKAGES:
        spec = find_spec(name)
        place = spec and (next(iter(spec.submodule_search_locations or ()), None) or spec.origin)
        if not place or Path(place).resolve() != _ROOT / name:
            return f"package {name!r} is found at {place}, not at {_ROOT / name}: take that folder off PYTHONPATH"
    return None


def _say_warnings_once() -> None:
    """Our own warnings are a line each; Python would show where in the source they come from, again and again."""
    shown, said = warnings.showwarning, set[str]()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        place = Path(filename).resolve()
        ours = place.is_relative_to(_ROOT) and place.relative_to(_ROOT).parts[0] in _PACKAGES
        if not ours or category is not UserWarning:
            shown(message, category, filename, lineno, file, line)
        elif str(message) not in said:
            said.add(str(message))
            _complain(message, 0)

    warnings.showwarning = show


def _complain(error: object, code: int) -> int:
    print(f"pushpull: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return code


def _heavy() -> None:
    """Check what is about to be imported before its own error says less."""
    from workers.install import check_install, check_torch_pair

    check_install()
    check_torch_pair()


def _settings(options: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name != "config" and not name.startswith("__")}


def _train(options: Any) -> int:
    from launch.config import RunConfig

    config = RunConfig(**_settings(options))
    _heavy()
    from launch.train import run

    return run(config).exit_code


def _bench(options: Any) -> int:
    from launch.bench_config import BenchConfig

    settings = _settings(options)
    tasks = settings.pop("tasks")
    config = BenchConfig(**settings)
    _heavy()
    from launch.bench import bench

    return bench(tasks, config)


def _bench_sync(options: Any) -> int:
    from launch.sync_config import SyncConfig

    config = SyncConfig(**_settings(options))
    _heavy()
    from launch.bench_sync import bench_sync

    return bench_sync(config)


def _bench_kill(options: Any) -> int:
    from launch.kill_config import KillConfig

    config = KillConfig(**_settings(options))
    _heavy()
    from launch.bench_kill import bench_kill

    return bench_kill(config)


def _data_check(options: Any) -> int:
    spec, config = _data_config(options)
    from launch.data import check_data

    found = check_data(spec, config)
    print("\n".join(line for checked in found for line in checked.lines()))
    if any(checked.pictures for checked in found):
        print(config.out)
    return _FAILED if any(checked.wrong for checked in found) else 0


def _data_show(options: Any) -> int:
    spec, config = _data_config(options)
    from launch.data import show_data

    print(show_data(spec, config))
    return 0


def _data_config(options: Any) -> tuple[str, Any]:
    from launch.data_config import DataConfig

    settings = _settings(options)
    spec = settings.pop("spec")
    config = DataConfig(**settings)
    _heavy()
    return spec, config


def _evaluate(options: Any) -> int:
    _heavy()
    from launch.evaluate import evaluate_run

    for name, value in evaluate_run(options.run, data=options.data, threads=options.threads).items():
        print(f"{name:24} {value:.4f}")
    return 0


def _predict(options: Any) -> int:
    _check_number(options.number, 1)
    _heavy()
    from launch.predict import predict_images, predict_validation

    chosen: dict[str, Any] = {"out": options.out, "threads": options.threads}
    if options.images:
        paths = predict_images(options.run, options.images, **chosen)
    else:
        paths = predict_validation(options.run, options.number, **chosen)
    print("\n".join(map(str, paths)))
    return 0


def _check_number(number: int, least: int) -> None:
    from paramserver.errors import ConfigError

    if number < least:
        raise ConfigError(f"--number is {number}: it must be {least} or more")


def _report(options: Any) -> int:
    _check_number(options.number, 0)
    _heavy()
    from launch.run_report import write_run_report

    print(write_run_report(options.run, number=options.number, threads=options.threads))
    return 0


def _diff(options: Any) -> int:
    from launch.diff import diff_runs

    difference = diff_runs(Path(options.one), Path(options.other))
    print("\n".join(difference.lines()))
    return 0 if difference.equal else _FAILED


def _tasks(_options: Any) -> int:
    from models.registry import list_tasks

    for name, about in list_tasks().items():
        print(f"{name:8} {about}")
    print("your own path/to/file.py:ClassName, a class with the methods of models/task.py")
    return 0


def _env(_options: Any) -> int:
    _heavy()
    import json

    from launch.environment import environment

    print(json.dumps(environment(), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
