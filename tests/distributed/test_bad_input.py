"""Bad input: the exit code, one line that names the thing and the remedy, and nothing left behind."""

import csv
import json
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.cli import main
from tests.support.processes import PUSHPULL
from tests.support.runs import train

_TINY = "--backend single --device cpu --image-size 64 --batch-size 4 --steps 2 --evaluate false"
TINY = _TINY.split()
Fails = Callable[..., str]


@pytest.fixture
def fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Fails:
    """Run ``pushpull`` in this process, expect an exit code, and give the one line back that it has to say."""

    def run(*arguments: str | Path, code: int = 2) -> str:
        assert main([str(argument) for argument in arguments]) == code
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("pushpull: ")
        return line

    return run


@pytest.fixture
def refused(tmp_path: Path, fails: Fails) -> Fails:
    """As ``fails``, for what is found before anything starts: exit code 2 unless told, nothing written."""

    def run(*arguments: str | Path, code: int = 2) -> str:
        before = sorted(tmp_path.rglob("*"))
        line = fails(*arguments, "--out", tmp_path / "runs", code=code)
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return run


OPTIONS = {
    "--workers 0": "--workers is 0: it must be 1 or more",
    "--workers two": "--workers: 'two' is not int",
    "--workers 2": "--backend single has one worker, not 2: use --backend ps or ddp",
    "--backend ps --workers 4 --microbatches 2": "4 workers, but only 2 microbatches: raise --microbatches",
    "--backend ps --address here": "--address 'here' is not host:port",
    "--backend dpp": "--backend: 'dpp' is not one of single, ps, ddp",
    "--microbatches 8": "8 microbatches, but only 4 samples in a minibatch: lower --microbatches or raise --batch-size",
    "--wokers 2": "unknown argument --wokers: did you mean --workers?",
    "--zzz": "unknown argument --zzz: --help behind the command lists",
    "surplus": "unknown argument surplus",
    "--lr": "--lr: expected one argument",
    "--lr -1": "lr is -1.0: it must be a finite number, 0 or more",
    "--recipe nosuch": "no recipe 'nosuch': use one of default, d2l",
    "--model nosuch": "no model 'nosuch': use one of tinyssd",
    "--image-size 12": "image size 12x12 is below 64",
    "--image-size big": "--image-size 'big' is neither a number nor HxW, e.g. 256 or 320x480",
    "--image-size 0": "--image-size 0 is neither a number nor HxW",
    "--lr-factors head": "--lr-factors 'head' is not PATTERN=FACTOR",
    "--lr-factors =": "--lr-factors '=' is not PATTERN=FACTOR",
    "--lr-factors nosuch.*=2": "pattern 'nosuch.*' fits none of the model's",
    "--freeze nosuch.*": "pattern 'nosuch.*' fits none of the model's",
    "--freeze *": "every parameter is frozen: nothing is left to train",
    "--data voc:/no/such/folder": "--data voc:/no/such/folder: no such folder",
    "--data cvat:/": "--data 'cvat:/' is not understood here: use one of synthetic, banana:PATH, voc:PATH, coco:PATH",
    "--resume /no/such/run": "/no/such/run: no such folder; name a run folder or a folder checkpoints/step_N in it",
}


@pytest.mark.parametrize("options", OPTIONS)
def test_option(options: str, refused: Fails) -> None:
    code = 1 if "--resume" in options else 2
    assert OPTIONS[options] in refused("train", "ssd", *TINY, *options.split(), code=code)


def test_command_line_without_sense(fails: Fails) -> None:
    assert "invalid choice: 'trian' (choose from" in fails("trian")
    assert "{train,bench,evaluate,predict,report" in fails()
    assert "arguments are required: run" in fails("evaluate")
    assert "no task: say pushpull train ssd" in fails("train")


def test_configuration_file(tmp_path: Path, refused: Fails) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("task: ssd\nbatch-sise: 4\n")
    assert "unknown key 'batch_sise' in the configuration file: did you mean batch_size?" in refused(
        "train", "--config", file
    )
    file.write_text("task: ssd\nsteps: many\n")
    assert "--steps: 'many' is not int" in refused("train", "--config", file)
    file.write_text("task: [ssd\n")
    assert "Problems parsing config" in refused("train", "--config", file)
    assert f"does not exist: '{tmp_path}/other.yaml'" in refused("train", "--config", tmp_path / "other.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0\n", "cannot be imported: ZeroDivisionError: division by zero"),
        ("def (\n", "cannot be imported: SyntaxError"),
        ("x = 1\n", "has no 'Mine': name the class of the task after the colon"),
        ("class Mine:\n    pass\n", "is not a task: it lacks build_model, "),
        (None, "no such task file: "),
    ],
)
def test_task_file(text: str | None, message: str, tmp_path: Path, refused: Fails) -> None:
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    line = refused("train", f"{file}:Mine", *TINY)
    assert message in line
    assert str(file) in line


def test_task_that_does_not_exist(refused: Fails) -> None:
    complaint = refused("train", "yolo", *TINY)
    assert "unknown task 'yolo': use one of ssd, fcn, rcnn, classify, or path/to/file.py:ClassName" in complaint


def test_out_that_cannot_be_written(tmp_path: Path, fails: Fails) -> None:
    file = tmp_path / "file"
    file.touch()
    line = fails("train", "ssd", *TINY, "--out", file / "runs")
    assert f"--out: {file} is not a folder: choose another place" in line
    # Not even root may write there.
    assert "--out: cannot write to /proc (" in fails("train", "ssd", *TINY, "--out", "/proc/runs")


def test_folder_that_exists(tmp_path: Path, fails: Fails) -> None:
    run = tmp_path / "run"
    run.mkdir()
    tiny = [*TINY, "--out", tmp_path, "--name", "run"]
    line = fails("train", "ssd", *tiny)
    assert f"{run} exists: choose another --name, or say --overwrite or --resume {run}" in line
    (run / "thesis.tex").touch()
    assert f"--overwrite: {run} is not a run folder" in fails("train", "ssd", *tiny, "--overwrite")
    assert [path.name for path in run.iterdir()] == ["thesis.tex"]


@pytest.mark.timeout(10)
def test_address_where_nobody_listens(refused: Fails) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    line = refused("train", "ssd", *TINY, "--backend", "ps", "--address", f"127.0.0.1:{port}")
    assert f"no Ray head listens at 127.0.0.1:{port}" in line
    assert line.endswith("start one, or leave --address out")


def test_torchvision_of_another_torch(tmp_path: Path) -> None:
    fake = tmp_path / "path" / "torchvision"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")\n')
    ended = subprocess.run(
        [PUSHPULL, "train", "ssd", *TINY, "--out", tmp_path / "runs"],
        env={**os.environ, "PYTHONPATH": str(fake.parent)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("pushpull: torch and torchvision do not fit together (operator torchvision::nms does not")
    assert "install both from the same index" in line
    assert not (tmp_path / "runs").exists()


# --- data ---


def banana_folder(root: Path, *, columns: str = "img_name,label,xmin,ymin,xmax,ymax", x2: int = 40) -> Path:
    """Four training images of 64x64 pixels, one box each."""
    folder = root / "fruit" / "bananas_train"
    (folder / "images").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, size=(64, 64, 3), dtype=np.uint8)
    with (folder / "label.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns.split(","))
        for index in range(4):
            Image.fromarray(pixels).save(folder / "images" / f"{index}.jpg")
            writer.writerow([f"{index}.jpg", 0, 10, 10, x2, 40])
    return folder.parent


def truncate(path: Path) -> None:
    """Leave the header, so that the size can still be read."""
    path.write_bytes(path.read_bytes()[:700])


def test_columns_and_boxes_of_a_label_file(tmp_path: Path, refused: Fails) -> None:
    data = banana_folder(tmp_path / "a", columns="img_name,label,xmin,ymin,right,ymax")
    line = refused("train", "ssd", *TINY, "--data", f"banana:{data}")
    assert f"{data}/bananas_train/label.csv lacks the column xmax: its first line must be" in line
    data = banana_folder(tmp_path / "b", x2=65)
    line = refused("train", "ssd", *TINY, "--data", f"banana:{data}")
    assert f"{data}/bananas_train/label.csv, line 2: box" in line
    assert "leaves its image of 64x64 pixels" in line


def test_validation_data_that_are_missing(tmp_path: Path, refused: Fails) -> None:
    # Found at the start, not after the last epoch.
    data = banana_folder(tmp_path)
    line = refused("train", "ssd", *TINY, "--data", f"banana:{data}", "--evaluate", "true")
    assert f"missing {data}/bananas_val/label.csv" in line


def assert_failed(run: Path, message: str) -> None:
    """The folder tells how the run ended, and holds nothing that looks finished."""
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert message in status["error"]
    assert not (run / "summary.json").exists()
    assert not any((run / "checkpoints").iterdir())


@pytest.mark.parametrize("backend", ["single", "ps"])
def test_broken_image(backend: str, tmp_path: Path, fails: Fails) -> None:
    data = banana_folder(tmp_path)
    broken = data / "bananas_train" / "images" / "2.jpg"
    truncate(broken)
    workers = ["--workers", "2"] if backend == "ps" else []
    tiny = [*TINY, "--backend", backend, *workers, "--out", tmp_path, "--name", "run"]
    assert f"broken image: {broken}: " in fails("train", "ssd", *tiny, "--data", f"banana:{data}", code=1)
    assert_failed(tmp_path / "run", f"broken image: {broken}: ")


def test_unknown_label_in_a_mask(tmp_path: Path, fails: Fails) -> None:
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / "voc" / folder).mkdir(parents=True)
    (tmp_path / "voc/ImageSets/Segmentation/train.txt").write_text("one\n")
    Image.new("RGB", (64, 64)).save(tmp_path / "voc/JPEGImages/one.jpg")
    mask = tmp_path / "voc/SegmentationClass/one.png"
    Image.new("L", (64, 64), color=77).save(mask)
    tiny = [*TINY, "--batch-size", "1", "--steps", "1", "--out", tmp_path, "--name", "run"]
    line = fails("train", "fcn", *tiny, "--data", f"voc:{tmp_path / 'voc'}", code=1)
    assert str(mask) in line
    assert "77" in line
    assert_failed(tmp_path / "run", str(mask))


# --- checkpoints ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of two steps."""
    out = tmp_path_factory.mktemp("finished")
    settings = {"backend": "single", "device": "cpu", "batch_size": 4, "steps": 2, "evaluate": False}
    return train(out, "run", task="ssd", image_size=64, **settings).folder


def test_resume_with_other_settings(finished: Path, refused: Fails) -> None:
    def resume(*options: str) -> str:
        return refused("train", "ssd", *TINY, "--resume", finished, *options, "--name", "more", code=1)

    line = resume("--steps", "4", "--batch-size", "5")
    assert f"--resume {finished}/checkpoints/step_2: it was written with batch_size 4, this run has 5" in line
    assert "it was written with seed 0, this run has 1" in resume("--steps", "4", "--seed", "1")
    assert "it has 2 steps already, and the run ends at 2: raise --steps or --epochs" in resume()


def test_resume_from_a_truncated_checkpoint(finished: Path, tmp_path: Path, refused: Fails) -> None:
    copy = tmp_path / "copy" / "checkpoints" / "step_2"
    copy.mkdir(parents=True)
    for file in (finished / "checkpoints" / "step_2").iterdir():
        content = file.read_bytes()
        (copy / file.name).write_bytes(content[:-100] if file.suffix == ".safetensors" else content)
    line = refused("train", "ssd", *TINY, "--steps", "4", "--name", "more", "--resume", copy.parent.parent, code=1)
    assert f"checkpoint {copy} cannot be read: " in line
    changed = bytearray((finished / "checkpoints" / "step_2" / "model.safetensors").read_bytes())
    changed[-1] ^= 1
    (copy / "model.safetensors").write_bytes(changed)
    line = refused("train", "ssd", *TINY, "--steps", "4", "--name", "more", "--resume", copy, code=1)
    assert f"checkpoint {copy} is damaged" in line


def test_resume_does_not_write_into_another_run(finished: Path, fails: Fails) -> None:
    other = finished.parent / "other"
    other.mkdir()
    (other / "config.yaml").touch()
    tiny = [*TINY, "--steps", "4", "--out", finished.parent, "--name", "other"]
    assert f"{other} exists: choose another --name" in fails("train", "ssd", *tiny, "--resume", finished)
    assert [path.name for path in other.iterdir()] == ["config.yaml"]
