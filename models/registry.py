"""Tasks by name, and a user's own task by the path of its file."""

import hashlib
import inspect
import linecache
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from models.errors import TaskError
from models.options import TaskOptions
from models.task import Task

__all__ = ["Packed", "TaskSource", "build_task", "list_tasks", "pack", "read_task"]


def _ssd(options: TaskOptions) -> Task:
    from models.ssd.task import SSDTask

    return SSDTask(options)


def _fcn(options: TaskOptions) -> Task:
    from models.fcn.task import FCNTask

    return FCNTask(options)


def _classify(options: TaskOptions) -> Task:
    from models.classify.task import ClassifyTask

    return ClassifyTask(options)


def _rcnn(options: TaskOptions) -> Task:
    from models.rcnn.task import RCNNTask

    return RCNNTask(options)


_TASKS: dict[str, tuple[str, Callable[[TaskOptions], Task]]] = {
    "ssd": ("single-shot object detection (TinySSD, SSD300)", _ssd),
    "fcn": (
        "semantic segmentation (FCN on ResNet-18 and -50, FCN-32s/16s/8s on VGG16)",
        _fcn,
    ),
    "rcnn": ("object detection in two stages (torchvision's Faster and Mask R-CNN)", _rcnn),
    "classify": ("image classification (LeNet, and torchvision's networks by name)", _classify),
}
_loaded: dict[str, tuple[Path, str]] = {}
"""Files of users' tasks by the names of their modules."""
_TASK_METHODS = ("build_model", "build_dataset", "collate", "loss", "predict", "build_metric")


def list_tasks() -> dict[str, str]:
    """Names of the built-in tasks with one line about each."""
    return {name: about for name, (about, _) in _TASKS.items()}


class TaskSource(NamedTuple):
    """A task as it travels to other processes and nodes."""

    name: str
    """Registered name, or ``path/to/file.py:ClassName``."""
    text: str | None = None
    """Text of the user's file; None for a registered task."""


def read_task(name: str) -> TaskSource:
    """Find a task by its registered name, or read the file of ``path/to/file.py:ClassName``.

    Raises:
        TaskError: if there is no such task or file.
    """
    if name in _TASKS:
        return TaskSource(name)
    path, colon, _ = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise TaskError(
            f"unknown task {name!r}: use one of {', '.join(_TASKS)}, or path/to/file.py:ClassName for your own"
        )
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise TaskError(f"no such task file: {file}")
    return TaskSource(f"{file}:{name[len(path) + 1 :]}", file.read_text(encoding="utf-8"))


def build_task(source: TaskSource | str, options: TaskOptions) -> Task:
    """Build a task.

    A user's class is called with ``options`` if its constructor needs an argument or has one of that name, else
    with none.

    Raises:
        TaskError: if there is no such task, file or class, or the class is not a task.
    """
    source = read_task(source) if isinstance(source, str) else source
    if source.text is None:
        return _TASKS[source.name][1](options)
    path, _, attribute = source.name.rpartition(":")
    factory = getattr(_load_text(Path(path), source.text), attribute, None)
    if factory is None:
        raise TaskError(f"{path} has no {attribute!r}: name the class of the task after the colon")
    task: Task = factory(options) if _wants_options(factory) else factory()
    missing = [method for method in _TASK_METHODS if not callable(getattr(task, method, None))]
    if missing:
        raise TaskError(f"{source.name} is not a task: it lacks {', '.join(missing)} (see models/task.py)")
    if not hasattr(task, "name"):
        task.name = attribute
    return task


def _wants_options(factory: Callable[..., Task]) -> bool:
    parameters = inspect.signature(factory).parameters.values()
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.kind in named and (p.default is p.empty or p.name == "options") for p in parameters)


def _load_text(path: Path, text: str) -> ModuleType:
    """Run a file's text as a module whose name is made of its content, so that it can never shadow another one."""
    unique = f"pushpull_task_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if unique in sys.modules:
        return sys.modules[unique]
    module = ModuleType(unique)
    module.__file__ = str(path)
    # Dataclasses and pickle look their module up while it is being executed, tracebacks look for its lines.
    sys.modules[unique] = module
    _loaded[unique] = (path, text)
    linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))
    try:
        exec(compile(text, str(path), "exec"), module.__dict__)
    except Exception as error:
        del sys.modules[unique], _loaded[unique]
        raise TaskError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


class Packed(NamedTuple):
    """Something for another process of this machine, with the files of users' tasks that it may be made of."""

    files: tuple[tuple[Path, str], ...]
    """Paths and texts."""
    content: bytes

    def unpack(self) -> Any:
        """The thing itself."""
        for path, text in self.files:
            _load_text(path, text)
        return pickle.loads(self.content)


def pack(thing: Any) -> Packed:
    """Pack a task, its data set, or what holds them.

    Raises:
        TaskError: if it cannot be pickled.
    """
    try:
        return Packed(tuple(_loaded.values()), pickle.dumps(thing))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TaskError(f"the task's data set cannot be sent to another process: {error}") from error
