"""The task classify: its networks, its data, its loss and its metric."""

import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from models.classify.metric import ClassificationMetric, Scores
from models.classify.networks import LeNet, build_network
from models.classify.task import ClassifyTask
from models.data.classification import SYNTHETIC_LABELS
from models.errors import DataError, TaskError
from models.options import TaskOptions
from models.task import Batch


def _batch(count: int, size: int, classes: int) -> Batch:
    return Batch(torch.randn(count, 3, size, size), {"label": torch.arange(count) % classes}, torch.arange(count))


def test_lenet_has_the_widths_of_the_tutorials() -> None:
    assert LeNet(10)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sum(parameter.numel() for parameter in LeNet(10).parameters()) == 121_182


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "vit_b_16"])
def test_torchvisions_networks_by_name(name: str) -> None:
    with torch.device("meta"):
        assert build_network(name, 7, (64, 64)).eval()(torch.empty(2, 3, 64, 64)).shape == (2, 7)


def test_the_loss_is_a_sum_with_auxiliary_heads() -> None:
    torch.manual_seed(0)
    task = ClassifyTask(TaskOptions(model="googlenet", image_size=(64, 64)))
    model, batch = task.build_model().train(), _batch(3, 64, 4)
    torch.manual_seed(1)
    logits, second, first = model(batch.images)
    torch.manual_seed(1)
    total, weight = task.loss(model, batch)
    parts = [F.cross_entropy(x, batch.targets["label"], reduction="sum") for x in (logits, second, first)]
    torch.testing.assert_close(total, parts[0] + 0.3 * (parts[1] + parts[2]))
    assert weight.item() == 3


def test_metric_by_hand_in_any_order() -> None:
    classes = tuple("abcdef")
    scores = torch.eye(6)[[0, 0, 2, 5]] + 0.1 * torch.arange(6)
    batch = Batch(torch.zeros(4, 3, 1, 1), {"label": torch.tensor([0, 1, 2, 3])}, torch.arange(4))
    whole, first, second = (ClassificationMetric(classes) for _ in range(3))
    whole.update(Scores(scores), batch)
    for part, chosen in ((first, slice(0, 1)), (second, slice(1, 4))):
        part.update(
            Scores(scores[chosen]), Batch(batch.images[chosen], {"label": batch.targets["label"][chosen]}, chosen)
        )
    second.merge(pickle.loads(pickle.dumps(first)))
    assert whole.compute() == second.compute()
    assert whole.compute() == {
        "accuracy": 0.5,
        "top5_accuracy": 0.75,  # of the second image, b has the sixth place
        "mean_accuracy": 0.5,
        "accuracy/a": 1.0,
        "accuracy/b": 0.0,
        "accuracy/c": 1.0,
        "accuracy/d": 0.0,
    }
    assert all(value != value for value in ClassificationMetric(classes).compute().values())


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for split, count in (("train", 3), ("val", 1)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 50), (10 * i, 0, 0)).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def test_a_folder_of_class_folders(folders: Path) -> None:
    task = ClassifyTask(TaskOptions(data=f"folder:{folders}"))
    assert task.classes == ("cat", "dog")
    train, val = task.build_dataset("train"), task.build_dataset("val")
    assert [int(train[i].target["label"]) for i in range(6)] == [0, 0, 0, 1, 1, 1]
    assert len(val) == 2  # type: ignore[arg-type]
    batch = task.collate([train[0], train[5]])
    assert batch.images.shape == (2, 3, 32, 32)
    torch.manual_seed(0)
    first = train[1].image
    torch.manual_seed(0)
    assert torch.equal(first, train[1].image), "a function of the global seed"
    assert torch.equal(val[0].image, val[0].image)


def test_what_is_wrong_is_named(folders: Path, tmp_path: Path) -> None:
    (folders / "val" / "bird").mkdir()
    with pytest.raises(DataError, match=r"val/bird is none of the classes cat, dog"):
        ClassifyTask(TaskOptions(data=f"folder:{folders}")).build_dataset("val")
    with pytest.raises(DataError, match="does not hold the files of cifar-10-batches-py"):
        ClassifyTask(TaskOptions(data=f"cifar10:{tmp_path}")).build_dataset("train")
    with pytest.raises(TaskError, match="classify has no model 'lenet6': use lenet, or one of torchvision"):
        ClassifyTask(TaskOptions(model="lenet6"))
    with pytest.raises(TaskError, match="64x64: lenet takes images of 32x32 alone"):
        ClassifyTask(TaskOptions(image_size=(64, 64)))
    with pytest.raises(TaskError, match="--classes: synthetic has 4 classes, and each needs a name"):
        ClassifyTask(TaskOptions(classes=("disc", "square", "triangle")))


def test_synthetic_images_have_the_class_of_what_is_largest() -> None:
    task = ClassifyTask(TaskOptions(synthetic_train=64))
    labels = [int(task.build_dataset("train")[i].target["label"]) for i in range(64)]
    assert task.classes == SYNTHETIC_LABELS
    assert set(labels) == {0, 1, 2, 3}


def test_drawing_writes_the_class_on_a_copy() -> None:
    task = ClassifyTask(TaskOptions())
    image = torch.zeros(3, 60, 90, dtype=torch.uint8)
    with torch.no_grad():
        outputs = task.predict(task.build_model().eval(), Batch(task.prepare(image)[None], {}, torch.zeros(1)))
    drawn = task.draw(image, outputs, 0)
    assert drawn.shape == image.shape
    assert drawn.any()
    assert not image.any()
