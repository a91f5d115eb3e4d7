"""Synthetic segmentation: the same pictures for the same seed, exact masks, some without a label."""

import pytest
import torch
from torch import Tensor

from models.data.synthetic_segmentation import SyntheticSegmentation
from models.data.voc_classes import VOID
from models.task import Sample, Split


def _untouched(image: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return image, {"mask": mask}


def _pictures(split: Split = "train", seed: int = 0, length: int = 32) -> list[Sample]:
    dataset = SyntheticSegmentation(split, length, (64, 96), seed, _untouched)
    return [dataset[index] for index in range(len(dataset))]


def test_a_picture_depends_on_seed_split_and_index_alone() -> None:
    torch.manual_seed(1)
    first = _pictures()
    torch.manual_seed(2)
    dataset = SyntheticSegmentation("train", 32, (64, 96), 0, _untouched)
    for index in reversed(range(32)):
        assert torch.equal(dataset[index].image, first[index].image)
        assert torch.equal(dataset[index].target["mask"], first[index].target["mask"])
        assert dataset[index].id == index
    for other in (_pictures(seed=1, length=1), _pictures("val", length=1)):
        assert not torch.equal(other[0].image, first[0].image)


def test_one_in_sixteen_has_no_labelled_pixel() -> None:
    unlabelled = [sample.id for sample in _pictures() if sample.target["mask"].eq(VOID).all()]
    assert unlabelled == [5, 21]


def test_all_classes_occur_with_a_void_ring() -> None:
    masks = torch.stack([sample.target["mask"] for sample in _pictures()])
    assert masks.unique().tolist() == [0, 1, 2, 3, VOID]
    for mask_HW in masks:
        # Background never touches a shape: the ring lies between them.
        for left, right in ((mask_HW[:, :-1], mask_HW[:, 1:]), (mask_HW[:-1], mask_HW[1:])):
            assert not ((left == 0) & (right > 0) & (right != VOID)).any()
            assert not ((right == 0) & (left > 0) & (left != VOID)).any()


def test_shapes_have_the_colour_of_their_class() -> None:
    for sample in _pictures():
        for label, channel in ((1, 0), (2, 1), (3, 2)):
            colours_3P = sample.image[:, sample.target["mask"] == label]
            assert (colours_3P.argmax(dim=0) == channel).all()


def test_an_index_past_the_end_is_an_index_error() -> None:
    with pytest.raises(IndexError):
        SyntheticSegmentation("val", 2, (64, 96), 0, _untouched)[2]
