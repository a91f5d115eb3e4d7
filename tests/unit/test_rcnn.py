"""torchvision's two-stage detectors behind the seam: losses, predictions, and masks that stay with their boxes."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from models.data.coco_detection import CocoDetection
from models.data.detection_transforms import Augmentation, DetectionTransform
from models.data.pixels import RAW
from models.data.synthetic_detection import SyntheticDetection
from models.detection.outputs import PADDING
from models.errors import DataError, TaskError
from models.options import TaskOptions
from models.rcnn.task import RCNNTask, list_networks
from models.task import Drawable, Showable
from workers.seeding import seeded

SIZE = (96, 128)


def _task(model: str | None = None, **options: object) -> RCNNTask:
    return RCNNTask(TaskOptions(model=model, image_size=SIZE, synthetic_train=40, synthetic_val=8, **options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    with seeded("model", 0):
        return _task().build_model()


def test_the_loss_is_torchvision_s_times_images(model: torch.nn.Module) -> None:
    task = _task()
    dataset = task.build_dataset("train")
    batch = task.collate([dataset[index] for index in range(3)])
    targets = []
    for boxes, labels in zip(batch.targets["boxes"], batch.targets["labels"], strict=True):
        corners = boxes[labels != PADDING] * torch.tensor([128, 96, 128, 96])
        targets.append({"boxes": corners, "labels": labels[labels != PADDING] + 1})
    model.train()
    with seeded("a"):
        wanted = model(list(batch.images), targets)
    with seeded("a"):
        loss = task.loss(model, batch)
    assert loss.total.item() == pytest.approx(3 * sum(value.item() for value in wanted.values()), rel=1e-6)
    assert (loss.weight.item(), loss.weight.dtype) == (3.0, torch.float64)


def test_images_without_objects_have_a_loss(model: torch.nn.Module) -> None:
    task = _task()
    empty = next(sample for sample in task.build_dataset("train") if not len(sample.target["labels"]))
    loss = task.loss(model.train(), task.collate([empty]))
    assert loss.total.isfinite()
    loss.total.backward()


def test_predictions_are_parts_of_the_image_and_are_scored(model: torch.nn.Module) -> None:
    task = _task()
    assert isinstance(task, Drawable)
    assert isinstance(task, Showable)
    dataset = task.build_dataset("val")
    batch = task.collate([dataset[0], dataset[1]])
    model.eval()
    with torch.no_grad():
        outputs = task.predict(model, batch)
    for found in outputs.detections:
        assert found.boxes_D4.ge(0).all()
        assert found.boxes_D4.le(1).all()
        assert set(found.labels_D.tolist()) <= {0, 1}
    metric = task.build_metric()
    metric.update(outputs, batch)
    assert {"ap50", "ap50_11point"} <= metric.compute().keys()
    assert "class_error" not in metric.compute(), "nobody asks the anchors"
    assert task.draw(task.restore(batch.images[0]), outputs, 0).shape == (3, *SIZE)


def test_mask_rcnn_learns_masks_and_predicts_them() -> None:
    task = _task("maskrcnn_resnet50_fpn")
    model = task.build_model()
    dataset = task.build_dataset("train")
    batch = task.collate([dataset[0], dataset[1]])
    assert batch.targets["masks"].shape == (2, batch.targets["labels"].shape[1], *SIZE)
    loss = task.loss(model.train(), batch)
    loss.total.backward()
    weight = model.roi_heads.mask_predictor.mask_fcn_logits.weight  # type: ignore[union-attr]
    assert weight.grad is not None
    assert weight.grad.any()
    model.eval()
    with torch.no_grad():
        found = task.predict(model, batch).detections[0]
    assert found.masks_DHW is not None
    assert found.masks_DHW.shape == (len(found.scores_D), *SIZE)
    assert task.show(dataset[0]).shape == (3, *SIZE)


def _extent(mask_HW: Tensor) -> list[float]:
    """Corners of what is set, as parts of width and height."""
    rows, columns = mask_HW.any(dim=1).nonzero().flatten(), mask_HW.any(dim=0).nonzero().flatten()
    height, width = mask_HW.shape
    edges = (columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height)
    return [float(edge) for edge in edges]


@pytest.mark.parametrize("augment", ["none", "light"])
def test_a_mask_fills_its_box_through_every_flip(augment: Augmentation) -> None:
    transform = DetectionTransform(SIZE, augment=augment, pixels=RAW)
    dataset = SyntheticDetection("train", 30, 0, transform, ("disc", "square"), masks=True)
    seen = 0
    for index in range(30):
        with seeded("sample", index):
            target = dataset[index].target
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            assert _extent(mask) == pytest.approx(box.tolist(), abs=1.5 / min(SIZE))
            seen += 1
    assert seen > 20


def test_crops_keep_masks_and_boxes_together() -> None:
    dataset = SyntheticDetection("train", 30, 0, DetectionTransform(SIZE, augment="ssd", pixels=RAW), masks=True)
    for index in range(30):
        with seeded("sample", index):
            target = dataset[index].target
        assert target["masks"].shape == (len(target["labels"]), *SIZE)
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            if mask.any():  # a crop may take all of a disc's part of its box
                x1, y1, x2, y2 = _extent(mask)
                assert x1 >= box[0] - 0.03
                assert y1 >= box[1] - 0.03
                assert x2 <= box[2] + 0.03
                assert y2 <= box[3] + 0.03


def _coco(root: Path, segmentation: object) -> Path:
    (root / "annotations").mkdir()
    (root / "train").mkdir()
    Image.new("RGB", (40, 20)).save(root / "train" / "a.png")
    row = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 5, 20, 10], "segmentation": segmentation}
    images = [{"id": 1, "file_name": "a.png", "width": 40, "height": 20}]
    content = {"images": images, "categories": [{"id": 1, "name": "dog"}], "annotations": [row]}
    (root / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return root


def test_polygons_become_masks(tmp_path: Path) -> None:
    root = _coco(tmp_path, [[10, 5, 29, 5, 29, 14, 10, 14]])
    plain = DetectionTransform((20, 40), augment="none", pixels=RAW)
    target = CocoDetection(root, "train", plain, ("dog",), crowds=False, masks=True)[0].target
    wanted = torch.zeros(1, 20, 40, dtype=torch.bool)
    wanted[0, 5:15, 10:30] = True
    assert torch.equal(target["masks"], wanted)


@pytest.mark.parametrize("segmentation", [None, [], [[1, 2, 3, 4]], {"counts": "abc", "size": [20, 40]}, [["x"] * 6]])
def test_what_is_no_polygon_is_named(tmp_path: Path, segmentation: object) -> None:
    root = _coco(tmp_path, segmentation)
    plain = DetectionTransform((20, 40), augment="none", pixels=RAW)
    with pytest.raises(DataError, match="annotation 1: segmentation must be polygons"):
        CocoDetection(root, "train", plain, ("dog",), crowds=False, masks=True)
    assert len(CocoDetection(root, "train", plain, ("dog",), crowds=False)) == 1, "boxes need none"


def test_bad_options_are_named(tmp_path: Path) -> None:
    assert "fasterrcnn_resnet50_fpn" in list_networks()
    with pytest.raises(TaskError, match="task rcnn has no model 'yolo'"):
        _task("yolo")
    with pytest.raises(TaskError, match="has no masks of objects: use one of synthetic, coco"):
        _task("maskrcnn_resnet50_fpn", data=f"voc:{tmp_path}")
    with pytest.raises(TaskError, match="image size 32x32 is below 64"):
        RCNNTask(TaskOptions(image_size=(32, 32)))
