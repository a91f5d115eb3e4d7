import pickle

import pytest
import torch

from models.data.detection_transforms import DetectionTransform
from models.data.pixels import RAW
from models.data.synthetic_detection import SyntheticDetection
from models.errors import DataError

PLAIN = DetectionTransform((64, 80), augment="none", pixels=RAW)


def _dataset(split="train", length=64, seed=0, **options):
    return SyntheticDetection(split, length, seed, PLAIN, **options)


def test_same_seed_same_sample_in_any_order_and_process():
    a, b = _dataset(), pickle.loads(pickle.dumps(_dataset(length=100)))
    for index in (5, 0, 63):
        x, y = a[index], b[index]
        assert torch.equal(x.image, y.image)
        assert all(torch.equal(x.target[name], y.target[name]) for name in x.target)
        assert x.id == index


def test_seed_split_and_index_matter():
    image = _dataset()[0].image
    for other in (_dataset(seed=1)[0], _dataset("val")[0], _dataset()[1], _dataset(seed=-1)[0]):
        assert not torch.equal(image, other.image)


def test_global_generators_are_left_alone():
    state = torch.get_rng_state()
    _dataset()[0]
    assert torch.equal(state, torch.get_rng_state())


def test_shapes_boxes_and_empty_images():
    counts = []
    for sample in map(_dataset(length=200).__getitem__, range(200)):
        boxes, labels = sample.target["boxes"], sample.target["labels"]
        assert sample.image.shape == (3, 64, 80)
        assert sample.image.dtype == torch.float32
        assert boxes.shape == (len(labels), 4)
        assert ((boxes >= 0) & (boxes <= 1)).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        counts.append(len(labels))
    assert set(counts) == {0, 1, 2, 3}
    assert 10 <= counts.count(0) <= 40  # one in eight


def test_box_encloses_its_shape():
    sample = next(s for s in map(_dataset(classes=("disc",)).__getitem__, range(64)) if len(s.target["labels"]) == 1)
    red = sample.image[0] - sample.image[2] > 60  # no background is that red: its channels differ by patches of noise
    x1, y1, x2, y2 = (sample.target["boxes"][0] * torch.tensor([80, 64, 80, 64])).round().int().tolist()
    disc = red[y1:y2, x1:x2]
    assert disc.any(dim=0).all()
    assert disc.any(dim=1).all()


def test_classes():
    dataset = _dataset(classes=("a", "b", "c"))
    assert dataset.classes == ("a", "b", "c")
    assert {int(x) for i in range(64) for x in dataset[i].target["labels"]} == {0, 1, 2}
    with pytest.raises(DataError, match="3 shapes"):
        _dataset(classes=("a", "b", "c", "d"))


def test_index_out_of_range():
    with pytest.raises(IndexError):
        _dataset()[64]
