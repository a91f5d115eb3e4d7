"""Started where somebody else's ``models/`` lies, PushPull imports its own; test_user_task.py has more backends."""

from pathlib import Path

import pytest

from tests.support.foreign import add_foreign_packages, pushpull_in

_TRAIN = "train ssd --backend single --device cpu --image-size 64 --batch-size 4 --steps 1 --evaluate false --out runs"
TRAIN = _TRAIN.split()


def test_training_starts_beside_foreign_packages(tmp_path: Path) -> None:
    add_foreign_packages(tmp_path)
    ended = pushpull_in(tmp_path, *TRAIN)
    assert ended.returncode == 0, ended.stderr
    assert "done      1 steps" in ended.stdout


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cluster", "cluster/__init__.py"),
        ("paramserver", "paramserver/__init__.py"),
        ("workers", "workers/__init__.py"),
        ("models", "models/__init__.py"),
        ("models", "models/without_init.py"),
        ("models", "models.py"),
        # A foreign launch/ would go before the console script itself: nothing of ours is asked then.
    ],
)
def test_package_on_pythonpath_is_named(name: str, file: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("raise RuntimeError\n")
    ended = pushpull_in(tmp_path, *TRAIN, pythonpath=".")
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"pushpull: package {name!r} is found at {tmp_path / name}")
    assert line.endswith("take that folder off PYTHONPATH")
    assert not (tmp_path / "runs").exists()
