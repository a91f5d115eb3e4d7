"""A run's folder: which one it is, what may not be overwritten, what is kept on resume."""

import json
from pathlib import Path

import pytest

from launch.config import RunConfig
from launch.run_folder import RunFolder, read_json, write_json
from paramserver.errors import CheckpointError, ConfigError


def make(out: Path, name: str) -> RunFolder:
    """A run folder with a file of an old run in it."""
    config = RunConfig(task="ssd", out=str(out), name=name)
    folder = RunFolder.choose(config)
    folder.create(config)
    folder.write("old.json", 1)
    return folder


def test_default_name_has_task_and_backend(tmp_path: Path) -> None:
    config = RunConfig(task="my/file.py:MyTask", backend="single", out=str(tmp_path))
    assert RunFolder.choose(config).path.name.startswith("MyTask-single-")
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_needs_overwrite_or_resume(tmp_path: Path) -> None:
    folder = make(tmp_path, "a")
    again = RunConfig(task="ssd", out=str(tmp_path), name="a")
    with pytest.raises(ConfigError, match="a exists: choose another --name, or say --overwrite or --resume"):
        RunFolder.choose(again)
    resumed = RunConfig(task="ssd", out=str(tmp_path), name="a", resume=str(folder.checkpoints / "step_3"))
    RunFolder.choose(resumed).create(resumed)
    assert (folder.path / "old.json").exists()
    overwritten = RunConfig(task="ssd", out=str(tmp_path), name="a", overwrite=True)
    RunFolder.choose(overwritten).create(overwritten)
    assert not (folder.path / "old.json").exists()


def test_resuming_one_run_spares_another(tmp_path: Path) -> None:
    first, second = make(tmp_path, "first"), make(tmp_path, "second")
    config = RunConfig(task="ssd", out=str(tmp_path), name="second", resume=str(first.path))
    with pytest.raises(ConfigError, match="second exists"):
        RunFolder.choose(config)
    assert (second.path / "old.json").exists()


def test_resume_without_a_name_goes_on_in_the_run_s_own_folder(tmp_path: Path) -> None:
    folder = make(tmp_path, "a")
    for path in (folder.path, folder.checkpoints / "step_3"):
        assert RunFolder.choose(RunConfig(task="ssd", out="elsewhere", resume=str(path))).path == folder.path


def test_overwrite_spares_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").touch()
    config = RunConfig(task="ssd", out=str(tmp_path), name="a", overwrite=True)
    with pytest.raises(ConfigError, match="is not a run folder"):
        RunFolder.choose(config)


def test_configuration_is_read_as_it_was_written(tmp_path: Path) -> None:
    config = RunConfig(task="ssd", out=str(tmp_path), lr=1e-3, freeze="*.bias", overwrite=True, dry_run=True)
    folder = RunFolder(tmp_path / "a")
    folder.create(config)
    # What belonged to that call is left out, the name is filled in.
    assert folder.read_config() == RunConfig(task="ssd", out=str(tmp_path), lr=1e-3, freeze="*.bias", name="a")


@pytest.mark.parametrize("text", ["no_such_setting: 1\n", "- a\n", "a: [\n", "workers: 0\n"])
def test_configuration_of_something_else(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError):
        RunFolder(tmp_path).read_config()


def test_cut_back_keeps_rows_up_to_the_step(tmp_path: Path) -> None:
    first, second = make(tmp_path, "first"), make(tmp_path, "second")
    for step in (1, 2, 3):
        first.append("metrics.jsonl", {"step": step})
        first.append("ledger.jsonl", {"step": step})
    second.append("metrics.jsonl", {"step": 9})
    second.cut_back(2, first)
    assert list(second.rows("metrics.jsonl")) == [{"step": 1}, {"step": 2}]
    first.cut_back(1, first)
    assert list(first.rows("ledger.jsonl")) == [{"step": 1}]


def test_torn_last_line_is_left_out(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append("metrics.jsonl", {"step": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert list(folder.rows("metrics.jsonl")) == [{"step": 1}]
    assert list(folder.rows("nothing.jsonl")) == []


def test_json_is_replaced_and_leaves_no_other_file(tmp_path: Path) -> None:
    for value in (1, {"nan": float("inf")}):
        write_json(tmp_path / "a.json", value)
        assert read_json(tmp_path / "a.json") == value
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    (tmp_path / "a.json").write_text(json.dumps([1])[:-1])
    with pytest.raises(CheckpointError, match=r"cannot read .*a\.json"):
        read_json(tmp_path / "a.json")
