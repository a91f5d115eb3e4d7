"""Rules about who may use what, which import-linter does not see: read from the source, nothing is run."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("models", "paramserver", "workers", "cluster", "launch")
ENVIRONMENT = ("cluster/session.py", "workers/device.py", "workers/process_group.py")
DISTRIBUTED = ("workers/ddp.py", "workers/process_group.py")
CONFIG_MODULES = [
    "models.options",
    "paramserver.config",
    "paramserver.errors",
    "workers.config",
    "cluster.config",
    "launch.config",
    "launch.arguments",
]


@cache
def _sources() -> dict[str, ast.Module]:
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 30
    return {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text(encoding="utf-8")) for file in files}


def _imported(tree: ast.AST) -> Iterator[str]:
    """Full names of what a module imports, at its top or in a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _used(tree: ast.AST) -> Iterator[str]:
    """Names and dotted names that a module mentions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            yield ast.unparse(node)


def _calls(tree: ast.AST) -> Iterator[str]:
    yield from (ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call))


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


@cache
def _names(found_by: str) -> dict[str, set[str]]:
    find = {"import": _imported, "name": _used, "call": _calls}[found_by]
    return {file: set(find(tree)) for file, tree in _sources().items()}


def _files_that(uses: str, *, found_by: str) -> set[str]:
    return {file for file, names in _names(found_by).items() if any(_within(name, uses) for name in names)}


def test_ray_is_imported_in_cluster_alone() -> None:
    files = _files_that("ray", found_by="import")
    assert files
    assert all(file.startswith("cluster/") for file in files), sorted(files)


def test_torch_distributed_is_used_in_two_files() -> None:
    files = _files_that("torch.distributed", found_by="import") | _files_that("torch.distributed", found_by="name")
    assert files == set(DISTRIBUTED)
    parallel = _files_that("torch.nn.parallel", found_by="import")
    assert parallel == {"workers/ddp.py"}


def test_print_and_argument_parsing_are_launchs() -> None:
    for found_by, name in [("call", "print"), ("import", "argparse"), ("import", "jsonargparse"), ("name", "sys.argv")]:
        files = _files_that(name, found_by=found_by)
        assert all(file.startswith("launch/") for file in files), (name, sorted(files))


@pytest.mark.parametrize("name", ["os.environ", "os.getenv", "os.putenv", "os.unsetenv"])
def test_the_environment_is_read_in_launch_and_where_processes_are_started_or_joined(name: str) -> None:
    files = _files_that(name, found_by="name") | _files_that(name, found_by="import")
    assert {file for file in files if not file.startswith("launch/")} <= set(ENVIRONMENT)


@pytest.mark.parametrize("module", CONFIG_MODULES)
def test_configuration_imports_neither_torch_nor_ray(module: str) -> None:
    heavy = "{'torch', 'torchvision', 'ray', 'numpy'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")
