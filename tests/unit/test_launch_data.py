"""``pushpull data``: all that is wrong with a data set is found in one pass; pictures show what training sees."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from launch.cli import main
from launch.data import Checked, check_data, show_data
from launch.data_config import DataConfig
from models.data.images import read_image
from models.errors import DataError
from models.options import TaskOptions
from models.ssd.task import SSDTask
from paramserver.errors import ConfigError
from workers.samples import SeededDataset

SHARED = Path(__file__).parents[3] / "shared" / "data"


def _image(path: Path, colour: tuple[int, int, int] = (90, 120, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 20), colour).save(path)


def _mask(path: Path, *rows: int, size: tuple[int, int] = (20, 40)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.repeat(np.array(rows, dtype=np.uint8), -(-size[0] // len(rows)))[: size[0], None].repeat(
        size[1], axis=1
    )
    Image.fromarray(values).save(path)


def _broken(path: Path) -> None:
    _image(path)
    path.write_bytes(path.read_bytes()[:60])


def _text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _banana(root: Path) -> str:
    folder = root / "bananas_train"
    for name in ("good", "unlabelled"):
        _image(folder / "images" / f"{name}.png")
    _broken(folder / "images" / "broken.png")
    rows = ["good.png,0,0,0,20,10", "good.png,0,0,0,41,10", "good.png,0,9,9,9,12", "gone.png,0,0,0,20,10"]
    rows += ["broken.png,0,0,0,20,10", "good.png,0,zero,0,20,10", "good.png,0,nan,0,20,10"]
    _text(folder / "label.csv", "\n".join(["img_name,label,xmin,ymin,xmax,ymax", *rows]))
    return "banana"


def _voc(root: Path) -> str:
    def annotation(stem: str, *corners: int) -> None:
        sides = "".join(f"<{n}>{v}</{n}>" for n, v in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
        inside = f"<object><name>dog</name><bndbox>{sides}</bndbox></object>"
        _text(root / "Annotations" / f"{stem}.xml", f"<annotation>{inside}</annotation>")

    boxes = {"good": (1, 1, 20, 10), "outside": (1, 1, 50, 10), "point": (5, 5, 5, 5), "broken": (1, 1, 20, 10)}
    for stem, corners in boxes.items():
        _image(root / "JPEGImages" / f"{stem}.png")
        annotation(stem, *corners)
    annotation("gone", 1, 1, 20, 10)
    _broken(root / "JPEGImages" / "broken.png")
    _image(root / "JPEGImages" / "bare.png")
    _image(root / "JPEGImages" / "torn.png")
    _text(root / "Annotations" / "torn.xml", "<annotation><object>")
    _text(root / "ImageSets" / "Main" / "train.txt", "\n".join([*boxes, "gone", "bare", "torn"]))
    return "voc"


def _coco(root: Path) -> str:
    _image(root / "train2017" / "good.jpg")
    _broken(root / "train2017" / "broken.jpg")
    images = [
        {"id": number, "file_name": f"{name}.jpg", "width": 40, "height": 20}
        for number, name in enumerate(("good", "broken", "gone"))
    ]
    boxes = [
        (0, 1, [0, 0, 20, 10]),
        (0, 1, [0, 0, 60, 10]),
        (0, 1, [3, 3, 0, 5]),
        (7, 1, [0, 0, 1, 1]),
        (0, 9, [0, 0, 9, 9]),
    ]
    annotations = [
        {"id": number, "image_id": image, "category_id": category, "bbox": box}
        for number, (image, category, box) in enumerate(boxes)
    ]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "dog"}]}
    _text(root / "annotations" / "instances_train2017.json", json.dumps(content))
    return "coco"


def _masks(root: Path) -> str:
    _text(root / "classes.csv", "name,id\nroad,0\ncar,1\n")
    folder = root / "train"
    for name in ("good", "bare", "small", "foreign", "torn"):
        _image(folder / "images" / f"{name}.jpg")
    _mask(folder / "masks" / "good.png", 0, 1)
    _mask(folder / "masks" / "small.png", 0, 1, size=(10, 40))
    _mask(folder / "masks" / "foreign.png", 0, 7)
    _mask(folder / "masks" / "alone.png", 0, 1)
    _mask(folder / "masks" / "torn.png", 0, 1)
    torn = folder / "masks" / "torn.png"
    torn.write_bytes(torn.read_bytes()[:60])
    return "masks"


def _folder(root: Path) -> str:
    for split in ("train", "val"):
        _image(root / split / "cat" / "a.png")
    _image(root / "val" / "dog" / "a.png")
    _broken(root / "train" / "cat" / "b.png")
    return "folder"


@pytest.mark.parametrize(
    ("make", "images", "wrong"),
    [
        (
            _banana,
            1,
            {
                "box outside its image": 1,
                "box without extent": 1,
                "missing file": 1,
                "broken file": 1,
                "wrong annotation": 2,
                "missing annotation": 1,
            },
        ),
        (
            _voc,
            5,  # also those whose annotation is wrong: the image is there
            {
                "box outside its image": 1,
                "box without extent": 1,
                "missing file": 1,
                "broken file": 1,
                "missing annotation": 1,
                "wrong annotation": 1,
            },
        ),
        (
            _coco,
            1,
            {
                "box outside its image": 1,
                "box without extent": 1,
                "missing file": 1,
                "broken file": 1,
                "wrong annotation": 1,
                "unknown label": 1,
            },
        ),
        (
            _masks,
            1,
            {
                "missing annotation": 1,
                "missing file": 1,
                "mask of another size": 1,
                "unknown label": 1,
                "broken file": 1,
            },
        ),
        (_folder, 1, {"broken file": 1}),
    ],
)
def test_all_that_is_wrong_is_found_at_once(
    tmp_path: Path, make: Callable[[Path], str], images: int, wrong: dict[str, int]
) -> None:
    spec = f"{make(tmp_path)}:{tmp_path}"
    train, _ = check_data(spec, DataConfig(out=str(tmp_path / "sheet.png")))
    found = {kind: len(messages) for kind, messages in train.wrong.items()}
    assert (found, train.images) == (wrong, images), train.wrong
    assert all(str(tmp_path) in message for messages in train.wrong.values() for message in messages)
    assert read_image(tmp_path / "sheet.png").shape[0] == 3


def test_what_is_right_is_counted_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "data"
    _text(root / "classes.csv", "name,id\nroad,0\ncar,1\nvoid,255\n")
    for split in ("train", "val"):
        _image(root / split / "images" / "a.jpg", (0, 0, 0))
        _mask(root / split / "masks" / "a.png", 0, 1, 1, 255)
    out = tmp_path / "sheet.png"
    assert main(["data", "check", f"masks:{root}", "--out", str(out), "--image-size", "32"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "train: 1 images; car 400, road 200, void 200",
        "val: 1 images; car 400, road 200, void 200",
        str(out),
    ]
    assert {tuple(pixel) for pixel in read_image(out).flatten(1).T.tolist()} >= {(255, 255, 255)}


def test_one_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = f"{_banana(tmp_path)}:{tmp_path}"
    assert main(["data", "check", spec, f"--out={tmp_path / 'sheet.png'}"]) == 1
    printed = capsys.readouterr().out
    assert "train: 1 images; class0 1" in printed
    assert f"  1 x missing file\n    {tmp_path}/bananas_train/label.csv, line 5: missing image" in printed
    assert "val: 0 images; nothing labelled\n  1 x wrong layout\n" in printed


def test_what_is_wrong_with_a_row_says_nothing_of_others(tmp_path: Path) -> None:
    columns = "img_name,label,xmin,ymin,xmax,ymax"
    _text(tmp_path / "bananas_train" / "label.csv", f"{columns}\na.png,zero,0,0,9,9")
    _image(tmp_path / "bananas_train" / "images" / "a.png")
    _text(tmp_path / "bananas_val" / "label.csv", f"{columns}\nb.png,1,0,0,9,9")
    train, val = check_data(f"banana:{tmp_path}", DataConfig(out=str(tmp_path / "sheet.png")))
    assert {kind: len(found) for kind, found in train.wrong.items()} == {"wrong annotation": 1}
    assert list(val.wrong) == ["missing file"]
    _text(tmp_path / "bananas_train" / "label.csv", "name\n")
    _image(tmp_path / "bananas_val" / "images" / "b.png")
    train, val = check_data(f"banana:{tmp_path}", DataConfig(out=str(tmp_path / "sheet.png")))
    assert list(train.wrong) == ["wrong layout"]
    assert (val.images, val.wrong) == (1, {})
    assert "  nothing of class0" in val.lines()


def test_a_sheet_is_of_all_classes(tmp_path: Path) -> None:
    for number, name in enumerate(("cat", "dog", "owl")):
        for index in range(4):
            _image(tmp_path / "train" / name / f"{index}.png", (80 * number, 0, 0))
        _image(tmp_path / "val" / name / "0.png", (80 * number, 0, 0))
    config = DataConfig(images=3, image_size="32", out=str(tmp_path / "sheet.png"))
    train, _ = check_data(f"folder:{tmp_path}", config)
    assert [int(picture[0, -1, -1]) for picture in train.pictures] == [0, 80, 160]
    sheet = read_image(show_data(f"folder:{tmp_path}", config))
    assert {0, 80, 160} <= set(sheet[0].flatten().tolist())


def test_many_alike_are_shortened() -> None:
    checked = Checked("train")
    for number in range(5):
        checked.note(DataError(f"file {number}", "broken file"))
    assert list(checked.lines())[1:] == ["  5 x broken file", *(f"    file {n}" for n in range(3)), "    and 2 more"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "check", "nothing:here"], "'nothing:here': use one of banana:PATH"),
        (["data", "check", "voc:/nowhere"], "no such folder: /nowhere"),
        (["data", "show", "synthetic", "--task", "ssd", "--augment", "wild"], "task ssd has no --augment 'wild'"),
        (["data", "show", "synthetic", "--task", "ssd", "--images", "0"], "--images is 0: it must be 1 or more"),
        (["data", "show", "synthetic", "--task", "ssd", "--out", "/nowhere/a.png"], "cannot be written"),
        (["data", "show", "synthetic", "--task", "ssd", "--out", "photo.jpg"], "must end in .png"),
        (["data", "check", "synthetic", "--task", "ssd", "--classes", "a,b,a"], "each name may stand there once"),
        (["data", "draw"], "say pushpull data check SPEC"),
        (["data", "check"], "arguments are required: spec"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    complaint = capsys.readouterr().err
    assert message in complaint
    assert complaint.count("\n") == 1


def test_a_picture_shows_what_training_gets(tmp_path: Path) -> None:
    def sheet(**settings: object) -> torch.Tensor:
        config = DataConfig(
            task="ssd", augment="ssd", images=1, image_size="64", out=str(tmp_path / "a.png"), **settings
        )
        return read_image(show_data("synthetic", config))

    task = SSDTask(TaskOptions(augment="ssd", image_size=(64, 64)))
    wanted = task.show(SeededDataset(task.build_dataset("train"), 0)[2, 0])
    assert torch.equal(sheet(epoch=2), wanted)
    assert torch.equal(sheet(epoch=2), sheet(epoch=2))
    assert not torch.equal(sheet(epoch=2), sheet(epoch=3))
    assert not torch.equal(sheet(seed=1), sheet(seed=2))


def test_a_task_that_shows_nothing_is_told(tmp_path: Path) -> None:
    file = tmp_path / "task.py"
    methods = ("build_model", "build_dataset", "collate", "loss", "predict", "build_metric")
    file.write_text("class Mine:\n" + "".join(f"    def {name}(self, *_): ...\n" for name in methods))
    with pytest.raises(ConfigError, match="shows no samples: give its class the methods of"):
        show_data("synthetic", DataConfig(task=f"{file}:Mine"))


@pytest.mark.skipif(not SHARED.is_dir(), reason="real data is not beside this checkout")
def test_real_data(tmp_path: Path) -> None:
    out = DataConfig(out=str(tmp_path / "a.png"))
    train, val = check_data(f"voc:{SHARED / 'bccd'}", out)
    assert {kind: len(found) for checked in (train, val) for kind, found in checked.wrong.items()}.keys() <= {
        "box without extent"
    }
    assert train.counts["RBC"] > train.counts["WBC"] > 0
