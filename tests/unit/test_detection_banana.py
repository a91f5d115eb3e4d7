import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image

from models.data.banana import BananaDetection, banana_classes
from models.data.detection_transforms import DetectionTransform
from models.data.pixels import RAW
from models.errors import DataError

HEADER = "img_name,label,xmin,ymin,xmax,ymax"
PLAIN = DetectionTransform((64, 64), augment="none", pixels=RAW)
SEALS = Path(__file__).parents[3] / "shared" / "data" / "seals"


def _write(root, *lines, header=HEADER, split="train"):
    images = root / f"bananas_{split}" / "images"
    images.mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 20), (10, 20, 30)).save(images / name)
    (images.parent / "label.csv").write_text("\n".join((header, *lines)) + "\n")


def _read(root, split="train", classes=("x", "y")):
    return BananaDetection(root, split, PLAIN, classes)


def test_boxes_in_parts_and_several_rows_an_image(tmp_path):
    _write(tmp_path, "a.png,0,0,0,40,20", "b.png,1,4,2,20,10", "a.png,1,10,5,20,15")
    dataset = pickle.loads(pickle.dumps(_read(tmp_path)))
    assert len(dataset) == 2
    sample = dataset[0]
    assert sample.image.shape == (3, 64, 64)
    torch.testing.assert_close(sample.target["boxes"], torch.tensor([[0, 0, 1, 1], [0.25, 0.25, 0.5, 0.75]]))
    assert sample.target["labels"].tolist() == [0, 1]
    assert dataset[1].id == 1


def test_classes_are_counted_over_both_splits(tmp_path):
    _write(tmp_path, "a.png,0,0,0,40,20")
    assert banana_classes(tmp_path) == ("class0",)
    _write(tmp_path, "a.png,2,0,0,40,20", split="val")
    assert banana_classes(tmp_path) == ("class0", "class1", "class2")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.png,0,20,5,20,15", r"label.csv, line 3: box .* is empty"),
        ("a.png,0,30,5,20,15", r"label.csv, line 3: box .* is empty"),
        ("a.png,0,-1,5,20,15", r"line 3: box .* leaves its image of 40x20 pixels"),
        ("a.png,0,1,5,41,15", r"line 3: box .* leaves its image"),
        ("a.png,0,one,5,20,15", r"line 3: .* must be numbers: .*'one'"),
        ("a.png,0,nan,5,20,15", r"line 3: .* must be numbers: nan is not a finite number"),
        ("a.png,0,1,5", r"line 3: .* must be numbers"),
        ("a.png,2,1,5,20,15", r"line 3: label 2 is not one of 0..1"),
        ("a.png,-1,1,5,20,15", r"line 3: label -1 is not one of 0..1"),
        ("c.png,0,1,5,20,15", r"line 3: missing image .*c.png: add the file or remove the line"),
    ],
)
def test_wrong_lines_are_named(tmp_path, line, message):
    _write(tmp_path, "b.png,0,1,1,9,9", line)
    with pytest.raises(DataError, match=message):
        _read(tmp_path)


def test_missing_files_and_columns_are_named(tmp_path):
    with pytest.raises(DataError, match=r"missing .*bananas_train.*label.csv"):
        _read(tmp_path)
    with pytest.raises(DataError, match=r"missing .*label.csv"):
        banana_classes(tmp_path)
    _write(tmp_path, header="img_name,label,xmin,ymin,xmax")
    with pytest.raises(DataError, match=r"label.csv lacks the column ymax: its first line must be img_name,"):
        _read(tmp_path)


def test_empty_list_and_broken_image(tmp_path):
    _write(tmp_path)
    with pytest.raises(DataError, match="lists no image"):
        _read(tmp_path)
    _write(tmp_path, "a.png,0,1,1,9,9", split="val")
    (tmp_path / "bananas_val" / "images" / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"line 2: broken image .*a.png"):
        _read(tmp_path, "val")


@pytest.mark.skipif(not SEALS.is_dir(), reason=f"needs the seals data set in {SEALS}")
def test_seals():
    assert banana_classes(SEALS) == ("class0",)
    train, val = (_read(SEALS, split, ("seal",)) for split in ("train", "val"))
    assert (len(train), len(val)) == (900, 100)
    assert val[0].target["boxes"].shape == (1, 4)
