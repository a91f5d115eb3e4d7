"""The arguments of every command, made from the configuration dataclasses: a field is an option is a YAML key."""

import argparse
import dataclasses
import difflib
import itertools
import re
import textwrap
from collections.abc import Sequence
from typing import Any

import jsonargparse
import yaml

from launch.bench_config import BenchConfig
from launch.config import RunConfig
from launch.data_config import DataConfig
from launch.kill_config import KillConfig
from launch.sync_config import SyncConfig
from paramserver.errors import ConfigError

__all__ = ["CHECK", "KILL", "SHOW", "SYNC", "build_parser", "config_first"]

SYNC = "bench-sync"
KILL = "bench-kill"
CHECK = "data-check"
SHOW = "data-show"
"""The commands that are written ``bench sync`` … ``data show``: with options of their own, which a subcommand alone can
have."""

_YAML = "pushpull-yaml"
_CONFIGS: dict[str, type] = {
    "train": RunConfig,
    "bench": BenchConfig,
    SYNC: SyncConfig,
    KILL: KillConfig,
    CHECK: DataConfig,
    SHOW: DataConfig,
}
"""What the options of each command are made from, where there are many."""


class _Parser(jsonargparse.ArgumentParser):  # type: ignore[misc]
    """Raises one line where argparse would print usage and exit."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        own = [name.lstrip("-").replace("-", "_") for name in self._option_string_actions]
        raise ConfigError(_one_line(message, own)) from ex


def _one_line(message: str, own: Sequence[str] = ()) -> str:
    """What a parser says, in one line that names the option and what it should be.

    Args:
        message: the parser's.
        own: names of its options.
    """
    if found := re.match(r"unrecognized arguments: (\S+)", message):
        return f"unknown argument {found[1]}{_did_you_mean(found[1], own)}"
    if found := re.search(r"Subcommand '([^']+)' does not accept option '([^']+)'", message):
        keys = [field.name for field in dataclasses.fields(_CONFIGS[found[1]])] if found[1] in _CONFIGS else []
        return f"unknown key {found[2]!r} in the configuration file{_did_you_mean(found[2], keys)}"
    key = re.search(r'Parser key "([\w.]+)"', message)
    if not key:
        # A subcommand's positional argument has the command's name before its own.
        return re.sub(r"(arguments are required: )[\w-]+\.", r"\1", " ".join(message.split()))
    option = f"--{key[1].rpartition('.')[2].replace('_', '-')}"
    given = re.search(r"(?:Given value|Got value): (.*)", message)
    wanted = [
        re.sub(r"<class '(\w+)'>|typing\.", r"\1", name)
        for name in re.findall(r"Expected an? (.+?)(?:\. Got value.*)?$", message, flags=re.MULTILINE)
        if "NoneType" not in name
    ]
    if given and wanted:
        return f"{option}: {given[1]!r} is not {_in_words(' or '.join(wanted))}"
    return f"{option}: {' '.join(message[key.end() + 1 :].split())}"


def _in_words(types: str) -> str:
    return re.sub(r"Literal\[(.*?)\]", lambda found: "one of " + found[1].replace("'", ""), types)


def _did_you_mean(word: str, own: Sequence[str]) -> str:
    """An option or key among ``own`` that looks like ``word``, written as ``word`` is."""
    name = word.lstrip("-").partition("=")[0].replace("-", "_")
    elsewhere = any(name == field.name for config in _CONFIGS.values() for field in dataclasses.fields(config))
    close = difflib.get_close_matches(name, own, n=1, cutoff=0.8 if elsewhere else 0.6)
    if elsewhere and not close:
        return ": another command has it, this one does not"
    if not close:
        return ": --help behind the command lists what there is"
    return f": did you mean {'--' + close[0].replace('_', '-') if word.startswith('-') else close[0]}?"


def _load_yaml(text: str, **options: Any) -> Any:
    """YAML whose keys may have dashes, as options have."""
    value = jsonargparse.get_loader("yaml")(text, **options)
    if isinstance(value, dict):
        return {key.replace("-", "_") if isinstance(key, str) else key: item for key, item in value.items()}
    return value


def build_parser() -> jsonargparse.ArgumentParser:
    """The parser of ``pushpull``; errors are raised as ``ConfigError``."""
    jsonargparse.set_loader(_YAML, _load_yaml, exceptions=(yaml.YAMLError,))
    parser = _new_parser("pushpull", "Train SSD and FCN by a synchronous parameter server on Ray, or by DDP.")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subcommands(dest="command", metavar="COMMAND")
    commands.add_subcommand("train", _train_parser(), help="train a task on one of three backends")
    commands.add_subcommand("bench", _bench_parser(), help="measure speedups over a single device")
    commands.add_subcommand("evaluate", _evaluate_parser(), help="compute a trained run's metrics")
    commands.add_subcommand("predict", _predict_parser(), help="draw a trained run's predictions into pictures")
    commands.add_subcommand("report", _report_parser(), help="write a run's curves and predictions on a page")
    commands.add_subcommand("diff", _diff_parser(), help="find the first step at which two runs differ")
    commands.add_subcommand("tasks", _new_parser("pushpull tasks", "List the built-in tasks."), help="list the tasks")
    about = "Show machine and library versions."
    commands.add_subcommand("env", _new_parser("pushpull env", about), help="show machine and versions")
    commands.add_subcommand(SYNC, _sync_parser(), help="as 'bench sync': measure one round of push, sum, update, pull")
    about = "as 'bench kill': measure what the death of a worker costs under ps and ddp"
    commands.add_subcommand(KILL, _kill_parser(), help=about)
    about = "Read every image and annotation once: count classes, name what is wrong, draw a contact sheet."
    commands.add_subcommand(
        CHECK, _data_parser("check", about), help="as 'data check': read a data set, say what is wrong"
    )
    about = "Draw training images as the model gets them, varied at random as in training."
    commands.add_subcommand(SHOW, _data_parser("show", about), help="as 'data show': draw what training sees")
    return parser


def config_first(arguments: Sequence[str]) -> list[str]:
    """Move ``--config FILE`` right behind the command: what stands on the line goes before the file, wherever it is."""
    rest: list[str] = []
    files: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--config":
            files += [word, *itertools.islice(words, 1)]
        elif word.startswith("--config="):
            files.append(word)
        else:
            rest.append(word)
    for command in (SYNC, KILL, CHECK, SHOW):
        if rest[:2] == command.split("-"):
            rest[:2] = [command]
    if rest[:1] == ["data"]:
        raise ConfigError("say pushpull data check SPEC or pushpull data show SPEC; --help behind it lists its options")
    if rest[:1] == ["predict"]:
        rest[1:] = _options_first(rest[1:])
    return rest[:1] + files + rest[1:]


def _options_first(words: Sequence[str]) -> list[str]:
    """Of a command whose options all have a value: argparse takes a list of words that may be empty in one piece."""
    options: list[str] = []
    others: list[str] = []
    left = iter(words)
    for word in left:
        if not word.startswith("-"):
            others.append(word)
        elif "=" in word or word in ("-h", "--help"):
            options.append(word)
        else:
            options += [word, *itertools.islice(left, 1)]
    return options + others


def _new_parser(program: str, about: str) -> _Parser:
    return _Parser(
        prog=program,
        description=about,
        exit_on_error=False,
        parser_mode=_YAML,
        default_env=False,
        allow_abbrev=False,  # the next option that is added would make an abbreviation ambiguous
    )


def _version() -> str:
    import importlib.metadata

    return f"pushpull {importlib.metadata.version('pushpull-sgd')}"


def _train_parser() -> _Parser:
    parser = _new_parser("pushpull train", "Train a task.")
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    about = "ssd, fcn, rcnn, classify, or path/to/file.py:ClassName"
    parser.add_argument("task", nargs="?", type=str, default=argparse.SUPPRESS, help=about)
    _add_fields(parser, RunConfig)
    return parser


def _bench_parser() -> _Parser:
    parser = _new_parser("pushpull bench", "Measure speedups over a tuned single-device loop; equality comes first.")
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("tasks", nargs="*", default=["ssd", "fcn"], help="ssd, fcn, or path/to/file.py:ClassName")
    _add_fields(parser, BenchConfig)
    return parser


def _sync_parser() -> _Parser:
    about = "Measure one round of push, sum, update and pull beside DDP, Ray's example and the memory's limit."
    parser = _new_parser("pushpull bench sync", about)
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    _add_fields(parser, SyncConfig)
    return parser


def _kill_parser() -> _Parser:
    parser = _new_parser("pushpull bench kill", "Kill one worker under ps and under ddp, and compare what it costs.")
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("--task", type=str, default="ssd", help="ssd, fcn, or path/to/file.py:ClassName")
    _add_fields(parser, KillConfig)
    return parser


def _data_parser(command: str, about: str) -> _Parser:
    parser = _new_parser(f"pushpull data {command}", about)
    parser.add_argument(
        "spec", type=str, help="banana:PATH, voc:PATH, coco:PATH, masks:PATH, folder:PATH or cifar10:PATH"
    )
    parser.add_argument("--task", type=str | None, default=None, help=_field_docs(DataConfig)["task"])
    _add_fields(parser, DataConfig)
    return parser


def _evaluate_parser() -> _Parser:
    parser = _new_parser("pushpull evaluate", "Compute a run's metrics on its validation split.")
    parser.add_argument("run", type=str, help="run folder, or one of its checkpoints/step_N")
    parser.add_argument("--data", type=str | None, default=None, help="other data than the run's")
    parser.add_argument("--threads", type=int | None, default=None, help="threads; default: the run's")
    return parser


def _predict_parser() -> _Parser:
    parser = _new_parser("pushpull predict", "Write pictures with a run's predictions drawn in.")
    parser.add_argument("run", type=str, help="run folder, or one of its checkpoints/step_N")
    about = "image files; none: images of the validation split, drawn beside what is known of them"
    parser.add_argument("images", nargs="*", type=str, default=[], help=about)
    parser.add_argument("--number", type=int, default=16, help="how many of the validation split")
    parser.add_argument(
        "--out", type=str | None, default=None, help="folder for the pictures; default: RUN/predictions"
    )
    parser.add_argument("--threads", type=int | None, default=None, help="threads; default: the run's")
    return parser


def _report_parser() -> _Parser:
    parser = _new_parser("pushpull report", "Write a run's curves, metrics and predictions into RUN/report.html.")
    parser.add_argument("run", type=str, help="run folder")
    parser.add_argument("--number", type=int, default=12, help="predictions that are shown, of the validation split")
    parser.add_argument("--threads", type=int | None, default=None, help="threads; default: the run's")
    return parser


def _diff_parser() -> _Parser:
    parser = _new_parser("pushpull diff", "Find where two runs part; exits with 1 if they do.")
    parser.add_argument("one", type=str, help="run folder")
    parser.add_argument("other", type=str, help="run folder")
    return parser


def _add_fields(parser: _Parser, config: type) -> None:
    """One option for each field of a dataclass, with the field's docstring as help."""
    docs = _field_docs(config)
    for field in dataclasses.fields(config):
        if field.name == "task":
            continue
        names = [f"--{field.name.replace('_', '-')}"]
        names += [f"--{field.name}"] * ("_" in field.name)
        flag: dict[str, Any] = {}
        if field.type in (bool, bool | None):
            flag = {"nargs": "?", "const": True}
        parser.add_argument(*names, type=field.type, default=field.default, help=docs.get(field.name, ""), **flag)


def _field_docs(config: type) -> dict[str, str]:
    """The string below each field of a dataclass, read from its source."""
    import ast
    import inspect

    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            docs[ast.unparse(field.target)] = str(below.value.value)
    return docs
