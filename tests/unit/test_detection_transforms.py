import torch
from torchvision.transforms.v2 import functional as TF

from models.data.detection_transforms import DetectionTransform, _jitter
from models.data.pixels import IMAGENET, RAW

IMAGE = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
BOXES = torch.tensor([[0.1, 0.2, 0.4, 0.9]])


def test_d2l_pixels_are_not_divided():
    image, boxes, *_ = DetectionTransform((40, 60), augment="none", pixels=RAW)(IMAGE, BOXES)
    assert torch.equal(image, IMAGE.float())
    assert torch.equal(boxes, BOXES)


def test_normalised_pixels():
    image, *_ = DetectionTransform((40, 60), augment="none", pixels=IMAGENET)(IMAGE, BOXES)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(image, (IMAGE / 255 - mean) / std, atol=1e-5, rtol=1e-5)


def test_resize_keeps_boxes_as_parts():
    image, boxes, *_ = DetectionTransform((32, 32), augment="none", pixels=IMAGENET)(IMAGE, BOXES)
    assert image.shape == (3, 32, 32)
    assert torch.equal(boxes, BOXES)


def test_augmentation_depends_on_the_global_seed_alone():
    transform = DetectionTransform((40, 60), augment="light", pixels=IMAGENET)
    results = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        results.append(transform(IMAGE, BOXES))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[2][0])


def test_jitter_agrees_with_torchvision_where_nothing_is_clipped():
    image = IMAGE.float() / 255 * 0.4 + 0.3
    expected = TF.adjust_brightness(TF.adjust_contrast(TF.adjust_saturation(image, 1.2), 0.85), 1.1)
    torch.testing.assert_close(_jitter(image, 1.1, 0.85, 1.2), expected, atol=1e-5, rtol=1e-5)


def test_half_of_the_images_are_flipped_with_their_boxes():
    transform = DetectionTransform((40, 60), augment="light", pixels=RAW)
    torch.manual_seed(0)
    flipped = 0
    for _ in range(60):
        image, boxes, *_ = transform(IMAGE, BOXES)
        # The jitter keeps what is bright bright: compare with the image and with its mirror.
        distance = [(image - other).abs().mean() for other in (IMAGE.float(), IMAGE.float().flip(2))]
        mirrored = bool(distance[1] < distance[0])
        expected = torch.tensor([[0.6, 0.2, 0.9, 0.9]]) if mirrored else BOXES
        torch.testing.assert_close(boxes, expected)
        flipped += mirrored
    assert 15 <= flipped <= 45


def test_images_without_boxes_and_untouched_input():
    before = IMAGE.clone()
    transform = DetectionTransform((40, 60), augment="light", pixels=IMAGENET)
    for seed in range(4):
        torch.manual_seed(seed)
        assert transform(IMAGE, torch.empty(0, 4))[1].shape == (0, 4)
    assert torch.equal(IMAGE, before)


BOTH = torch.tensor([[0.1, 0.2, 0.4, 0.9], [0.6, 0.5, 0.9, 0.8]])


def test_ssds_augmentation_keeps_what_is_still_seen():
    transform = DetectionTransform((48, 64), augment="ssd", pixels=RAW)
    counts, areas = set(), set()
    for seed in range(40):
        torch.manual_seed(seed)
        image, boxes, kept, _ = transform(IMAGE, BOTH)
        torch.manual_seed(seed)
        again = transform(IMAGE, BOTH)
        assert all(torch.equal(first, second) for first, second in zip((image, boxes, kept), again[:3], strict=True))
        assert image.shape == (3, 48, 64)
        assert boxes.shape == (len(kept), 4)
        assert ((boxes >= 0) & (boxes <= 1)).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        counts.add(len(kept))
        areas.add(round(float((boxes[:, 2:] - boxes[:, :2]).prod(dim=1).sum()), 2))
    assert counts == {1, 2}, "a crop always holds the centre of an object, and sometimes of both"
    assert min(areas) < 0.1, "zoomed out"
    assert max(areas) > 0.35, "cropped"


def test_ssds_augmentation_of_an_image_without_objects():
    transform = DetectionTransform((48, 64), augment="ssd", pixels=RAW)
    for seed in range(10):
        torch.manual_seed(seed)
        image, boxes, kept, _ = transform(IMAGE, torch.empty(0, 4))
        assert (image.shape, boxes.shape, kept.shape) == ((3, 48, 64), (0, 4), (0,))
