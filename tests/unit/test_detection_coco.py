"""COCO's layout: boxes, crowds, categories, and what is wrong with a file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from models.data.coco_detection import CocoDetection, coco_classes
from models.data.detection_transforms import DetectionTransform
from models.data.pixels import RAW
from models.errors import DataError
from models.options import TaskOptions
from models.ssd.task import SSDTask

PLAIN = DetectionTransform((64, 64), augment="none", pixels=RAW)
CLASSES = ("cat", "dog")


def _content() -> dict[str, Any]:
    return {
        "images": [
            {"id": 9, "file_name": "b.jpg", "width": 100, "height": 50},
            {"id": 4, "file_name": "a.jpg", "width": 80, "height": 80},
        ],
        "categories": [{"id": 18, "name": "dog"}, {"id": 17, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 18, "bbox": [10, 5, 40, 20], "iscrowd": 0},
            {"id": 2, "image_id": 9, "category_id": 17, "bbox": [0, 0, 100.5, 50], "iscrowd": 1},
        ],
    }


def _write(root: Path, content: dict[str, Any], split: str = "train2017") -> Path:
    (root / "annotations").mkdir(exist_ok=True)
    (root / split).mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    for image in content["images"]:
        Image.new("RGB", (image["width"], image["height"])).save(root / split / image["file_name"])
    return root


def test_boxes_categories_and_crowds(tmp_path: Path) -> None:
    root = _write(tmp_path, _content())
    assert coco_classes(root, "train") == CLASSES, "in the order of their ids"
    plain = CocoDetection(root, "train", PLAIN, CLASSES, crowds=False)
    assert len(plain) == 2
    assert len(plain[0].target["labels"]) == 0, "images in the order of their ids"
    torch.testing.assert_close(plain[1].target["boxes"], torch.tensor([[0.1, 0.1, 0.5, 0.5]]))
    assert plain[1].target["labels"].tolist() == [1]
    crowded = CocoDetection(root, "train2017", PLAIN, CLASSES, crowds=True)[1].target
    assert crowded["labels"].tolist() == [1, 0]
    assert crowded["difficult"].tolist() == [False, True]
    assert crowded["boxes"][1].tolist() == [0, 0, 1, 1]


def test_the_task_takes_it(tmp_path: Path) -> None:
    _write(_write(tmp_path, _content()), _content(), "val2017")
    task = SSDTask(TaskOptions(data=f"coco:{tmp_path}", image_size=(64, 64)))
    assert task.classes == CLASSES
    val = task.build_dataset("val")
    batch = task.collate([val[0], val[1]])
    assert batch.targets["difficult"].tolist() == [[False, False], [False, True]]


def test_boxes_without_extent_are_left_out(tmp_path: Path) -> None:
    content = _content()
    content["annotations"][0]["bbox"] = [10, 5, 0, 20]
    with pytest.warns(UserWarning, match="left out 1 box"):
        dataset = CocoDetection(_write(tmp_path, content), "train", PLAIN, CLASSES, crowds=False)
    assert len(dataset[1].target["labels"]) == 0


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"bbox": [90, 5, 40, 20]}, r"annotation 1: bbox .* leaves its image of 100x50"),
        ({"bbox": [1, 2, 3]}, "annotation 1: bbox .* must be x, y, width, height"),
        ({"image_id": 5}, "annotation 1: there is no image 5"),
        ({"category_id": 3}, r"category 3 \(None\) is not one of the 2 classes"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    content = _content()
    content["annotations"][0].update(change)
    with pytest.raises(DataError, match=complaint):
        CocoDetection(_write(tmp_path, content), "train", PLAIN, CLASSES, crowds=False)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing .*instances_train.json: splits there: none"):
        coco_classes(tmp_path, "train")
    root = _write(_write(tmp_path, _content()), _content(), "train2014")
    with pytest.raises(DataError, match="splits there: train2014, train2017"):
        coco_classes(root, "train")
    (root / "annotations" / "instances_val.json").write_text("[1, 2")
    with pytest.raises(DataError, match=r"instances_val\.json is not a file of COCO instances"):
        coco_classes(root, "val")
