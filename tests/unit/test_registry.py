"""Tasks by name, and a user's own task by the path of its file."""

import pickle
import sys
from pathlib import Path

import pytest

from models.errors import TaskError
from models.options import Recipe, TaskOptions
from models.registry import build_task, list_tasks
from models.task import recipe_of

METHODS = "\n".join(
    f"    def {name}(self, *args): ..."
    for name in ("build_model", "build_dataset", "collate", "loss", "predict", "build_metric")
)


def _write(folder: Path, source: str, name: str = "mine.py") -> str:
    (folder / name).write_text(source)
    return str(folder / name)


def test_built_in_tasks_are_listed_and_built() -> None:
    assert list(list_tasks()) == ["ssd", "fcn", "rcnn", "classify"]
    assert build_task("fcn", TaskOptions()).name == "fcn"


def test_a_class_that_takes_options_gets_them(tmp_path: Path) -> None:
    path = _write(
        tmp_path, f"class Mine:\n    def __init__(self, options):\n        self.options = options\n{METHODS}\n"
    )
    options = TaskOptions(seed=5)
    assert build_task(f"{path}:Mine", options).options is options


def test_a_class_without_arguments_is_called_with_none_and_named_after_itself(tmp_path: Path) -> None:
    path = _write(tmp_path, f"class Mine:\n{METHODS}\n")
    task = build_task(f"{path}:Mine", TaskOptions())
    assert task.name == "Mine"
    assert recipe_of(task, "default") == Recipe()


def test_a_task_keeps_the_name_it_has(tmp_path: Path) -> None:
    path = _write(tmp_path, f'class Mine:\n    name = "roads"\n{METHODS}\n')
    assert build_task(f"{path}:Mine", TaskOptions()).name == "roads"


def test_a_file_shadows_no_module_and_its_objects_survive_pickling(tmp_path: Path) -> None:
    path = _write(tmp_path, f"class Mine:\n{METHODS}\n", "json.py")
    before = sys.modules.get("json")
    task = build_task(f"{path}:Mine", TaskOptions())
    assert sys.modules.get("json") is before
    assert type(pickle.loads(pickle.dumps(task))) is type(task)
    assert type(build_task(f"{path}:Mine", TaskOptions())) is type(task)


def test_a_changed_file_is_loaded_again(tmp_path: Path) -> None:
    first = build_task(f"{_write(tmp_path, f'class Mine:{chr(10)}{METHODS}')}:Mine", TaskOptions())
    second = build_task(f"{_write(tmp_path, f'# changed{chr(10)}class Mine:{chr(10)}{METHODS}')}:Mine", TaskOptions())
    assert type(first) is not type(second)


@pytest.mark.parametrize("name", ["yolo", "", "models.fcn.task:FCNTask", "mine.py"])
def test_an_unknown_name_lists_what_there_is(name: str) -> None:
    with pytest.raises(TaskError, match=r"use one of ssd, fcn, rcnn, classify, or path/to/file\.py:ClassName"):
        build_task(name, TaskOptions())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"no such task file: .*gone\.py"):
        build_task(f"{tmp_path}/gone.py:Mine", TaskOptions())


@pytest.mark.parametrize("attribute", ["Other", ""])
def test_a_missing_class_is_named(tmp_path: Path, attribute: str) -> None:
    path = _write(tmp_path, f"class Mine:\n{METHODS}\n")
    with pytest.raises(TaskError, match=f"has no '{attribute}': name the class"):
        build_task(f"{path}:{attribute}", TaskOptions())


def test_what_a_class_lacks_is_listed(tmp_path: Path) -> None:
    path = _write(tmp_path, "class Mine:\n    def loss(self): ...\n")
    with pytest.raises(TaskError, match="is not a task: it lacks build_model, build_dataset, collate, predict, build"):
        build_task(f"{path}:Mine", TaskOptions())


def test_a_file_that_fails_is_named_and_not_kept(tmp_path: Path) -> None:
    path = _write(tmp_path, "import no_such_module_at_all\n")
    before = set(sys.modules)
    with pytest.raises(TaskError, match=r"mine\.py cannot be imported: ModuleNotFoundError: No module named"):
        build_task(f"{path}:Mine", TaskOptions())
    assert not {name for name in sys.modules if name.startswith("pushpull_task_")} - before
