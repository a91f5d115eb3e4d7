"""``pushpull evaluate`` gives the training's own numbers; ``pushpull predict`` draws into copies of pictures."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image

from launch.cli import main
from launch.evaluate import evaluate_run
from launch.predict import predict_images
from launch.run_report import write_run_report
from launch.trained import open_trained
from models.errors import DataError
from models.options import TaskOptions
from models.pictures import read_image
from models.registry import build_task
from models.task import Showable
from paramserver.errors import CheckpointError, ConfigError
from paramserver.fingerprint import fingerprint
from tests.support.runs import SMALL, train

STEPS = {"backend": "single", "device": "cpu", "batch_size": 4, "steps": 2}
COUNT = f"{Path(__file__).resolve().parents[2] / 'examples' / 'count_task.py'}:CountTask"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs ``ssd``, ``fcn`` and ``count``; ``ssd`` with two checkpoints and evaluations."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder, "ssd", **SMALL["ssd"], **STEPS, eval_every=1, checkpoint_every=1)
    train(folder, "fcn", **SMALL["fcn"], **STEPS, channels_last=True)
    train(folder, "count", task=COUNT, **STEPS)
    return folder


def same(left: Mapping[str, float], right: Mapping[str, float]) -> bool:
    """Whether all values are equal; NaN equals NaN."""
    return left.keys() == right.keys() and all(
        left[name] == right[name] or (math.isnan(left[name]) and math.isnan(right[name])) for name in left
    )


@pytest.mark.parametrize("task", ["ssd", "fcn", "count"])
def test_evaluate_repeats_the_training_s_numbers(task: str, out: Path) -> None:
    run = out / task
    at_end = json.loads((run / "summary.json").read_text())["metrics"]
    assert same(evaluate_run(str(run), data=None, threads=None), at_end)


def test_evaluate_takes_one_checkpoint_of_several(out: Path) -> None:
    run = out / "ssd"
    rows = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    first = next(row for row in rows if row.pop("step") == 1)
    assert same(evaluate_run(str(run / "checkpoints" / "step_1"), data=None, threads=None), first)


def test_evaluate_prints_names_and_values(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(out / "count"), "--threads", "1"]) == 0
    name, value = capsys.readouterr().out.split()
    assert name == "accuracy"
    metrics = json.loads((out / "count" / "summary.json").read_text())["metrics"]
    assert value == f"{metrics['accuracy']:.4f}"


def test_weights_load_without_pushpull(out: Path) -> None:
    weights = safetensors.torch.load_file(out / "fcn" / "checkpoints" / "step_2" / "model.safetensors")
    model = build_task("fcn", TaskOptions()).build_model()
    model.load_state_dict(weights, strict=True)
    summary = json.loads((out / "fcn" / "summary.json").read_text())
    assert fingerprint(model.state_dict()) == summary["fingerprint"]


def test_evaluate_refuses_what_is_no_run(out: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run folder: it has no config"):
        evaluate_run(str(tmp_path), data=None, threads=None)
    with pytest.raises(ConfigError, match="no such folder"):
        evaluate_run(str(out / "ssd"), data="voc:/no/such/folder", threads=None)
    with pytest.raises(ConfigError, match="--threads is 0"):
        evaluate_run(str(out / "ssd"), data=None, threads=0)
    shutil.copy(out / "ssd" / "config.yaml", tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        evaluate_run(str(tmp_path), data=None, threads=None)


def test_evaluate_refuses_a_checkpoint_of_another_model(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out / "ssd", tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "classes": "disc"}))
    with pytest.raises(CheckpointError, match=r"step_2 does not fit the model: 'class_heads.*' is \(\d+,.* in the one"):
        evaluate_run(str(tmp_path / "run"), data=None, threads=None)


# --- predict ---


def picture(path: Path, width: int, height: int) -> Path:
    """Coloured noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize("task", ["ssd", "fcn"])
def test_predict_draws_into_copies(
    task: str, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide, small = picture(tmp_path / "wide.png", 90, 50), picture(tmp_path / "small.jpg", 20, 30)
    # Two steps teach nothing: let the least likely object be drawn.
    monkeypatch.setattr("models.detection.task._DRAWN_SCORE", 0.0)
    before = wide.read_bytes()
    assert main(["predict", str(out / task), str(wide), str(small)]) == 0
    folder = out / task / "predictions"
    assert capsys.readouterr().out.splitlines() == [f"{folder}/wide.png", f"{folder}/small.png"]
    assert sorted(path.name for path in folder.iterdir()) == ["small.png", "wide.png"]
    with Image.open(folder / "wide.png") as drawn, Image.open(wide) as original:
        assert drawn.size == original.size
        assert (drawn.format, drawn.mode) == ("PNG", "RGB")
        assert np.any(np.asarray(drawn) != np.asarray(original))
    with Image.open(folder / "small.png") as drawn:
        assert drawn.size == (20, 30)
    assert wide.read_bytes() == before


def test_predict_overwrites_neither_another_picture_nor_an_input(out: Path, tmp_path: Path) -> None:
    first, second = picture(tmp_path / "a" / "same.png", 70, 70), picture(tmp_path / "b" / "same.jpg", 80, 80)
    before = first.read_bytes()
    written = predict_images(
        str(out / "ssd"), [str(first), str(second), str(first)], out=str(tmp_path / "a"), threads=None
    )
    assert [path.name for path in written] == ["same-2.png", "same-3.png", "same-4.png"]
    assert first.read_bytes() == before
    assert [read_image(path).shape[2] for path in written] == [70, 80, 70]


def test_predict_writes_nothing_if_a_picture_is_broken(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, broken = picture(tmp_path / "good.png", 70, 70), picture(tmp_path / "broken.png", 70, 70)
    broken.write_bytes(broken.read_bytes()[:1000])
    command = ["predict", str(out / "ssd"), "--out", str(tmp_path / "drawn"), str(good)]
    assert main([*command, str(broken)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pushpull: broken image: {broken}: ")
    with pytest.raises(DataError, match=r"missing image: .*other\.png"):
        predict_images(str(out / "ssd"), [str(good), str(tmp_path / "other.png")], out=None, threads=None)
    assert not (tmp_path / "drawn").exists()


def test_predict_says_where_it_cannot_write(out: Path, tmp_path: Path) -> None:
    good = picture(tmp_path / "good.png", 70, 70)
    with pytest.raises(ConfigError, match="--out: cannot write to /proc/pictures"):
        predict_images(str(out / "ssd"), [str(good)], out="/proc/pictures", threads=None)


def test_predict_needs_a_task_that_draws(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = picture(tmp_path / "good.png", 70, 70)
    assert main(["predict", str(out / "count"), str(good)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "pushpull: task count does not draw: give its class the methods prepare and draw of models.task.Drawable"
    )
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("task", ["ssd", "fcn"])
def test_predict_without_images_shows_what_is_known_beside(
    task: str, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(out / task), "--number", "3", "--out", str(tmp_path / "drawn")]) == 0
    written = capsys.readouterr().out.splitlines()
    assert written == [str(tmp_path / "drawn" / f"val-{index:05d}.png") for index in range(3)]
    run = open_trained(str(out / task))
    assert isinstance(run.task, Showable)
    known = run.task.show(run.task.build_dataset("val")[1])
    width = known.shape[2]
    drawn = read_image(Path(written[1]))
    assert drawn.shape == (3, known.shape[1], 2 * width + 4)
    assert torch.equal(drawn[:, :, :width], known)


def test_a_task_without_samples_to_show_wants_images(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(out / "count")]) == 2
    assert "does not draw" in capsys.readouterr().err


# --- report ---


@pytest.mark.parametrize("task", ["ssd", "count"])
def test_a_report_is_one_page(task: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(out / task), "--number", "2"]) == 0
    path = out / task / "report.html"
    assert capsys.readouterr().out.splitlines() == [str(path)]
    page = path.read_text()
    summary = json.loads((out / task / "summary.json").read_text())
    assert summary["fingerprint"] in page
    assert "CPU stand-ins, no GPU figure" in page
    assert 'src="http' not in page
    assert page.count("data:image/png;base64,") == (2 if task == "ssd" else 1), "curves, and predictions where it draws"
    assert not [file for file in path.parent.iterdir() if file.name.startswith(".")]


def test_a_run_that_was_cut_off_has_a_report_of_its_curves(out: Path, tmp_path: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(out / "ssd" / name, tmp_path)
    settings = yaml.safe_load((tmp_path / "config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**settings, "device": "auto"}))
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "lo')
    (tmp_path / "env.json").write_text('{"gpus": ["NVIDIA H100"]}', encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "no GPU figure" not in page
    (tmp_path / "env.json").unlink()
    assert main(["report", str(tmp_path)]) == 0
    assert "no GPU figure" in (tmp_path / "report.html").read_text()
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint there; a run saves one at its end"):
        write_run_report(str(tmp_path), number=1, threads=None)


@pytest.mark.parametrize(("command", "number"), [("predict", "0"), ("predict", "-3"), ("report", "-1")])
def test_there_is_no_such_number_of_pictures(command: str, number: str, out: Path, tmp_path: Path) -> None:
    drawn = ["--out", str(tmp_path / "drawn")] if command == "predict" else []
    assert main([command, str(out / "ssd"), "--number", number, *drawn]) == 2
    assert not (tmp_path / "drawn").exists()
