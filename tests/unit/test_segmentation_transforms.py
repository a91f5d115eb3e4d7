"""Segmentation transforms: image and mask move together, by torch's global generator alone."""

import pytest
import torch
from torch import Tensor

from models.data.segmentation_transforms import SegmentationTransform, normalise
from models.data.voc_classes import VOID


def _picture(height: int, width: int) -> tuple[Tensor, Tensor]:
    """An image whose red channel repeats the mask."""
    mask_HW = (torch.arange(height * width) % 251).view(height, width).to(torch.uint8)
    return torch.stack([mask_HW, mask_HW // 2, mask_HW // 3]), mask_HW


def _apply(transform: SegmentationTransform, picture: tuple[Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        image, target = transform(*picture)
    return image, target["mask"]


def test_the_global_generator_decides() -> None:
    transform, picture = SegmentationTransform("train", (32, 40)), _picture(60, 80)
    first, second = _apply(transform, picture, 7), _apply(transform, picture, 7)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    crops = {tuple(_apply(transform, picture, seed)[1].flatten().tolist()) for seed in range(8)}
    assert len(crops) == 8


@pytest.mark.parametrize("flip", [True, False])
def test_image_and_mask_are_cropped_and_flipped_together(flip: bool) -> None:
    transform, picture = SegmentationTransform("train", (32, 40), flip=flip), _picture(60, 80)
    flipped = 0
    for seed in range(16):
        image, mask = _apply(transform, picture, seed)
        assert (type(image), type(mask), image.dtype, mask.dtype) == (Tensor, Tensor, torch.float32, torch.uint8)
        assert image.shape == (3, 32, 40)
        red = normalise(mask.expand(3, -1, -1))[0]
        assert torch.equal(image[0], red)
        flipped += int((mask[0, 1].int() - mask[0, 0].int()) % 251 == 250)
    assert (0 < flipped < 16) if flip else flipped == 0


def test_a_small_image_is_padded_with_the_mean_and_void() -> None:
    transform, picture = SegmentationTransform("train", (64, 64)), _picture(20, 70)
    image, mask = _apply(transform, picture, 0)
    assert mask.shape == (64, 64)
    padded = mask == VOID
    assert padded.all(dim=1).sum() == 44
    assert image[:, padded].abs().max() < 0.01


def test_validation_keeps_the_whole_image_and_draws_nothing() -> None:
    picture = _picture(45, 70)
    state = torch.get_rng_state()
    image, target = SegmentationTransform("val", (32, 32))(*picture)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(target["mask"], picture[1])
    assert torch.equal(image, normalise(picture[0]))


def test_normalise_uses_imagenets_statistics() -> None:
    image = torch.tensor([0, 255, 51], dtype=torch.uint8).view(3, 1, 1)
    expected = torch.tensor([(0 - 0.485) / 0.229, (1 - 0.456) / 0.224, (0.2 - 0.406) / 0.225])
    torch.testing.assert_close(normalise(image).flatten(), expected)


def test_without_augmentation_the_middle_is_taken() -> None:
    transform = SegmentationTransform("train", (32, 40), augment="none")
    image, mask = _apply(transform, _picture(60, 80), 0)
    assert torch.equal(mask, _picture(60, 80)[1][14:46, 20:60])
    assert torch.equal(_apply(transform, _picture(60, 80), 1)[0], image)
    small, mask = _apply(transform, _picture(20, 80), 0)
    assert small.shape == (3, 32, 40)
    assert (mask == VOID).any(dim=1).tolist() == [False] * 20 + [True] * 12


def test_scale_jitter_moves_image_and_mask_together() -> None:
    transform = SegmentationTransform("train", (32, 40), augment="scale")
    mask_HW = torch.zeros(64, 80, dtype=torch.uint8)
    mask_HW[:, 40:] = 200
    sizes = set()
    for seed in range(20):
        image, mask = _apply(transform, (mask_HW.expand(3, -1, -1).contiguous(), mask_HW), seed)
        assert image.shape == (3, 32, 40)
        assert set(mask.unique().tolist()) <= {0, 200, VOID}, "labels are not mixed"
        sizes.add(int((mask != VOID).sum()))
        red = normalise(mask.expand(3, -1, -1))[0]
        inside = mask != VOID
        assert ((image[0] - red).abs() < 0.1)[inside].float().mean() > 0.8
    assert len(sizes) > 1, "smaller images than the crop are padded"
