import pickle
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from models.data.detection_transforms import DetectionTransform
from models.data.pixels import RAW
from models.data.voc_classes import VOC_CLASSES
from models.data.voc_detection import VOCDetection, voc_classes
from models.errors import DataError

PLAIN = DetectionTransform((64, 64), augment="none", pixels=RAW)
BCCD = Path(__file__).parents[3] / "shared" / "data" / "bccd"


def _object(name, *corners):
    sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    box = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    return f"<object><name>{name}</name><bndbox>{box}</bndbox></object>"


def _write(root, stem="a", *objects, split="train", suffix=".png"):
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 20)).save(root / "JPEGImages" / f"{stem}{suffix}")
    (root / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{''.join(objects)}</annotation>")
    with (root / "ImageSets" / "Main" / f"{split}.txt").open("a") as file:
        file.write(f"{stem}\n")


def _read(root, split="train", classes=("cat", "dog")):
    return VOCDetection(root, split, PLAIN, classes)


def test_pixels_counted_from_one_become_parts(tmp_path):
    _write(tmp_path, "a", _object("dog", 1, 1, 40, 20), _object("cat", 11, 6, 20, 15.0))
    _write(tmp_path, "b", suffix=".jpg")
    dataset = pickle.loads(pickle.dumps(_read(tmp_path)))
    torch.testing.assert_close(
        dataset[0].target["boxes"], torch.tensor([[0, 0, 1, 1], [0.25, 0.25, 0.5, 0.75]], dtype=torch.float32)
    )
    assert dataset[0].target["labels"].tolist() == [1, 0]
    assert dataset[1].target["boxes"].shape == (0, 4)
    assert len(dataset) == 2


def test_a_box_within_a_pixel_of_the_image_is_clipped(tmp_path):
    _write(tmp_path, "a", _object("dog", 0, 0, 41, 21))
    assert _read(tmp_path)[0].target["boxes"].tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("corners", [(-1, 5, 20, 15), (5, 5, 42, 15), (5, 5, 20, 22)])
def test_a_box_further_outside_is_named(tmp_path, corners):
    _write(tmp_path, "a", _object("dog", *corners))
    with pytest.raises(DataError, match=r"a.xml: box .* of dog leaves its image of 40x20 pixels"):
        _read(tmp_path)


def test_points_are_left_out_with_a_warning(tmp_path):
    _write(tmp_path, "a", _object("dog", 5, 5, 5, 5), _object("cat", 1, 1, 9, 9))
    with pytest.warns(UserWarning, match=r"left out 1 box.* a.xml"):
        dataset = _read(tmp_path)
    assert dataset[0].target["labels"].tolist() == [0]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (_object("dog", 20, 5, 10, 15), r"a.xml: box .* xmax must exceed xmin"),
        (_object("dog", "one", 5, 10, 15), r"a.xml: object 'dog' needs numbers"),
        ("<object><name>dog</name></object>", r"a.xml: object 'dog' needs numbers"),
        (_object("cow", 1, 5, 10, 15), r"a.xml: class 'cow' is not one of cat, dog: add it to --classes"),
        ("<object>", r"a.xml is not XML"),
    ],
)
def test_wrong_annotations_are_named(tmp_path, item, message):
    _write(tmp_path, "a", item)
    with pytest.raises(DataError, match=message):
        _read(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match="is not a VOC data set"):
        _read(tmp_path)
    _write(tmp_path, "a")
    with pytest.raises(DataError, match=r"missing .*trial.txt .lists that exist: train.: choose with --split-train"):
        _read(tmp_path, "trial")
    (tmp_path / "Annotations" / "a.xml").unlink()
    with pytest.raises(DataError, match=r"missing .*a.xml"):
        _read(tmp_path)
    _write(tmp_path, "a")
    (tmp_path / "JPEGImages" / "a.png").unlink()
    with pytest.raises(DataError, match=r"missing image: .*a.jpg"):
        _read(tmp_path)
    (tmp_path / "JPEGImages" / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"broken image: .*a.jpg"):
        _read(tmp_path)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("\n")
    with pytest.raises(DataError, match="lists no image"):
        _read(tmp_path)


def test_root_may_be_a_devkit_with_one_year(tmp_path):
    devkit = tmp_path / "VOCdevkit"
    _write(devkit / "VOC2007", "a", _object("dog", 1, 1, 9, 9))
    for root in (devkit / "VOC2007", devkit, tmp_path):
        assert len(_read(root)) == 1


def test_classes(tmp_path):
    _write(tmp_path, "a", _object("dog", 1, 1, 9, 9))
    assert voc_classes(tmp_path, ("train", "val")) == VOC_CLASSES
    _write(tmp_path, "b", _object("yak", 1, 1, 9, 9), split="val")
    assert voc_classes(tmp_path, ("train", "val")) == ("dog", "yak")
    _write(tmp_path, "c", split="empty")
    with pytest.raises(DataError, match="name the --classes"):
        voc_classes(tmp_path, ("empty",))
    with pytest.raises(DataError, match=r"missing .*other.txt"):
        voc_classes(tmp_path, ("other",))


@pytest.mark.skipif(not BCCD.is_dir(), reason=f"needs the BCCD data set in {BCCD}")
def test_bccd():
    classes = voc_classes(BCCD, ("train", "val"))
    assert classes == ("Platelets", "RBC", "WBC")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # two of its boxes are points
        train, val = (_read(BCCD, split, classes) for split in ("train", "val"))
    assert (len(train), len(val)) == (205, 87)
    assert train[0].image.shape == (3, 64, 64)
