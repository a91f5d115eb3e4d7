import pickle

import pytest
import torch

from models.errors import DataError, TaskError
from models.options import TaskOptions
from models.registry import build_task
from models.ssd.task import SSDTask
from models.task import Drawable, recipe_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def task():
    return SSDTask(TaskOptions(image_size=(64, 64), synthetic_train=8, synthetic_val=4))


@pytest.fixture(scope="module")
def model(task):
    torch.manual_seed(0)
    return task.build_model()


def _samples(task, split="val"):
    dataset = task.build_dataset(split)
    return [dataset[i] for i in range(len(dataset))]


def test_registered_and_drawable():
    assert isinstance(build_task("ssd", TaskOptions()), SSDTask)
    assert isinstance(SSDTask(TaskOptions()), Drawable)


@pytest.mark.parametrize("name", ["default", "d2l"])
def test_recipes(name):
    recipe = recipe_of(SSDTask(TaskOptions(recipe=name)), name)
    assert recipe.batch_size == 32
    assert recipe.optimizer == "sgd"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TaskOptions(model="vgg"), "no model 'vgg': use one of tinyssd"),
        (TaskOptions(recipe="fast"), "no recipe 'fast': use one of default, d2l"),
        (TaskOptions(image_size=(32, 256)), "32x256 is below 64"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(TaskError, match=message):
        SSDTask(options)


def test_data_is_understood_at_construction():
    with pytest.raises(DataError, match="coco"):
        SSDTask(TaskOptions(data="coco:somewhere"))


def test_same_seed_same_weights(task, model):
    torch.manual_seed(0)
    again = task.build_model().state_dict()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())


def test_collate_pads_to_the_largest_number_of_boxes(task):
    samples = _samples(task, "train")
    counts = [len(sample.target["labels"]) for sample in samples]
    batch = task.collate(samples)
    assert len(batch) == 8
    assert batch.ids.tolist() == list(range(8))
    assert batch.targets["boxes"].shape == (8, max(counts), 4)
    assert (batch.targets["labels"] >= 0).sum(dim=1).tolist() == counts


def test_collate_of_images_without_boxes_and_their_loss(task, model):
    empty = [sample._replace(target={name: t[:0] for name, t in sample.target.items()}) for sample in _samples(task)]
    batch = task.collate(empty)
    assert batch.targets["boxes"].shape == (4, 0, 4)
    total, weight = task.loss(model.train(), batch)
    assert total.requires_grad
    assert weight.item() == 4


def test_loss_of_parts_adds_up(task, model):
    samples = _samples(task)
    with torch.no_grad():  # evaluation mode: batch statistics would differ between the parts
        whole, first, second = (task.loss(model.eval(), task.collate(s)) for s in (samples, samples[:1], samples[1:]))
    torch.testing.assert_close(first.total + second.total, whole.total)
    assert first.weight + second.weight == whole.weight


def test_channels_last_batch(task, model):
    batch = task.collate(_samples(task)).to(CPU, channels_last=True)
    total, _ = task.loss(task.build_model().to(memory_format=torch.channels_last), batch)
    total.backward()
    assert total.isfinite()


def test_predict_metric_and_draw(task, model):
    batch = task.collate(_samples(task))
    with torch.inference_mode():
        outputs = task.predict(model.eval(), batch)
    metric = task.build_metric()
    metric.update(outputs, batch)
    assert set(pickle.loads(pickle.dumps(metric)).compute()) >= {
        "ap50",
        "ap50_11point",
        "class_error",
        "box_mae",
        "ap50/disc",
        "ap50/square",
    }
    assert len(outputs.detections) == 4
    image = torch.zeros(3, 50, 70, dtype=torch.uint8)
    drawn = task.draw(image, outputs, 0)
    assert drawn.shape == image.shape
    assert drawn.any()
    assert not image.any()


def test_predict_without_ground_truth_and_draw_without_detections(task, model):
    images = task.prepare(torch.zeros(3, 50, 70, dtype=torch.uint8))[None]
    assert images.shape == (1, 3, 64, 64)
    batch = task.collate(_samples(task)[:1])
    with torch.no_grad():
        outputs = task.predict(model.eval(), type(batch)(images, {}, batch.ids))
    assert outputs.errors is None
    nothing = outputs._replace(
        detections=[type(found)(*(part[:0] for part in found[:3])) for found in outputs.detections]
    )
    assert not task.draw(torch.zeros(3, 50, 70, dtype=torch.uint8), nothing, 0).any()


def test_a_few_steps_learn(task):
    torch.manual_seed(0)
    network = task.build_model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    batch = task.collate(_samples(task, "train"))
    losses = []
    for _ in range(8):
        total, weight = task.loss(network, batch)
        optimizer.zero_grad()
        (total / weight).backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < 0.6 * losses[0]
