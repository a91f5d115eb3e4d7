"""The FCN task: its options and recipes, collating, and one pass through everything on synthetic data."""

import pickle
from pathlib import Path

import pytest
import torch

from models.data.voc_classes import VOC_CLASSES, VOID
from models.errors import DataError, TaskError
from models.fcn.palette import voc_palette
from models.fcn.task import FCNTask
from models.options import TaskOptions
from models.task import Drawable, Sample, recipe_of

SMALL = TaskOptions(image_size=(32, 48), synthetic_train=8, synthetic_val=4)


def _sample(height: int, width: int, number: int = 0) -> Sample:
    return Sample(torch.ones(3, height, width), {"mask": torch.ones(height, width, dtype=torch.uint8)}, number)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TaskOptions(model="unet"), "no model 'unet': use one of fcn_resnet18"),
        (TaskOptions(recipe="fast"), "no recipe 'fast': use one of default, d2l"),
        (TaskOptions(image_size=(31, 64)), "31 64 is too small"),
        (TaskOptions(classes=("cat",)), "need 3 classes or more"),
        (TaskOptions(classes=tuple(map(str, range(255)))), "255 classes are too many"),
    ],
)
def test_an_option_that_does_not_fit_is_named(options: TaskOptions, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        FCNTask(options)


def test_data_of_another_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="use one of synthetic, voc:PATH"):
        FCNTask(TaskOptions(data=f"banana:{tmp_path}"))


def test_classes_come_from_the_data_or_the_options(tmp_path: Path) -> None:
    assert len(FCNTask(TaskOptions()).class_names) == 4
    assert FCNTask(TaskOptions(data=f"voc:{tmp_path}")).class_names == ("background", *VOC_CLASSES)
    assert FCNTask(TaskOptions(data=f"voc:{tmp_path}", classes=("road",))).class_names == ("background", "road")


@pytest.mark.parametrize("name", ["default", "d2l"])
def test_every_recipe_builds_its_task(name: str) -> None:
    task = FCNTask(TaskOptions(recipe=name))
    assert recipe_of(task, name) is FCNTask(TaskOptions()).recipes[name]


def test_the_d2l_recipe_makes_the_steps_of_d2l() -> None:
    recipe = FCNTask(TaskOptions()).recipes["d2l"]
    assert recipe.lr / recipe.batch_size == pytest.approx(0.001)
    assert recipe.lr * recipe.weight_decay == pytest.approx(0.001 * 1e-3)


def test_collate_pads_images_with_zeros_and_masks_with_void() -> None:
    batch = FCNTask(SMALL).collate([_sample(40, 50, 3), _sample(33, 60, 1)])
    assert batch.images.shape == (2, 3, 40, 60)
    assert batch.targets["mask"].dtype == torch.uint8
    assert batch.ids.tolist() == [3, 1]
    assert batch.images[0, :, :, 50:].eq(0).all()
    assert batch.targets["mask"][0, :, 50:].eq(VOID).all()
    assert batch.targets["mask"][1, 33:].eq(VOID).all()
    assert batch.targets["mask"][1, :33].eq(1).all()


def test_collate_pads_to_what_the_network_takes() -> None:
    assert FCNTask(SMALL).collate([_sample(5, 100)]).images.shape == (1, 3, 32, 100)


def test_from_data_to_loss_and_metric() -> None:
    task = FCNTask(SMALL)
    torch.manual_seed(0)
    model = task.build_model()
    train, val = pickle.loads(pickle.dumps((task.build_dataset("train"), task.build_dataset("val"))))
    batch = task.collate([train[index] for index in range(4)])
    loss = task.loss(model, batch)
    loss.total.backward()
    assert loss.weight == batch.targets["mask"].ne(VOID).sum()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    batch = task.collate([val[index] for index in range(4)])
    with torch.no_grad():
        outputs = task.predict(model.eval(), batch)
    assert outputs.shape == (4, 32, 48)
    assert outputs.dtype == torch.uint8
    metric = task.build_metric()
    metric.update(outputs, batch)
    assert 0 <= metric.compute()["mean_iou"] <= 1


@pytest.mark.parametrize("name", ["bg", "_background_", "Background", "road"])
def test_a_first_class_that_is_no_background_is_tinted(name: str, tmp_path: Path) -> None:
    (tmp_path / "classes.csv").write_text(f"name,id\n{name},0\ncar,1\n")
    task = FCNTask(TaskOptions(data=f"masks:{tmp_path}"))
    image = torch.full((3, 40, 40), 200, dtype=torch.uint8)
    drawn = task.draw(image, torch.zeros(1, 40, 40, dtype=torch.uint8), 0)
    assert task.classes == (("car",) if name != "road" else ("road", "car"))
    assert torch.equal(drawn, image) == (name != "road")
    assert len(drawn[:, 0, 0].unique()) == (1 if name != "road" else 2), "no black"


@pytest.mark.parametrize("size", [(50, 41), (20, 40)])
def test_a_picture_of_any_size_is_prepared_and_drawn(size: tuple[int, int]) -> None:
    task = FCNTask(SMALL)
    assert isinstance(task, Drawable)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    prepared = task.prepare(image)
    assert prepared.shape == (3, max(32, size[0]), max(32, size[1]))
    labels = torch.zeros(2, *prepared.shape[1:], dtype=torch.uint8)
    labels[1, :10, :10] = 2
    assert torch.equal(task.draw(image, labels, 0), image)
    drawn = task.draw(image, labels, 1)
    assert drawn.shape == image.shape
    assert torch.equal(drawn[:, 10:], image[:, 10:])
    assert not torch.equal(drawn[:, :10, :10], image[:, :10, :10])


def test_palette_is_that_of_voc() -> None:
    palette = voc_palette(21)
    assert (palette[1], palette[15], palette[20]) == ((128, 0, 0), (192, 128, 128), (0, 64, 128))
