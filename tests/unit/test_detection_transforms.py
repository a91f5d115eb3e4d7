import torch
from torchvision.transforms.v2 import functional as TF

from models.data.detection_transforms import DetectionTransform, _jitter

IMAGE = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
BOXES = torch.tensor([[0.1, 0.2, 0.4, 0.9]])


def test_d2l_pixels_are_not_divided():
    image, boxes = DetectionTransform((40, 60), augment=False, normalise=False)(IMAGE, BOXES)
    assert torch.equal(image, IMAGE.float())
    assert torch.equal(boxes, BOXES)


def test_normalised_pixels():
    image, _ = DetectionTransform((40, 60), augment=False, normalise=True)(IMAGE, BOXES)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(image, (IMAGE / 255 - mean) / std, atol=1e-5, rtol=1e-5)


def test_resize_keeps_boxes_as_parts():
    image, boxes = DetectionTransform((32, 32), augment=False, normalise=True)(IMAGE, BOXES)
    assert image.shape == (3, 32, 32)
    assert torch.equal(boxes, BOXES)


def test_augmentation_depends_on_the_global_seed_alone():
    transform = DetectionTransform((40, 60), augment=True, normalise=True)
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
    transform = DetectionTransform((40, 60), augment=True, normalise=False)
    torch.manual_seed(0)
    flipped = 0
    for _ in range(60):
        image, boxes = transform(IMAGE, BOXES)
        # The jitter keeps what is bright bright: compare with the image and with its mirror.
        distance = [(image - other).abs().mean() for other in (IMAGE.float(), IMAGE.float().flip(2))]
        mirrored = bool(distance[1] < distance[0])
        expected = torch.tensor([[0.6, 0.2, 0.9, 0.9]]) if mirrored else BOXES
        torch.testing.assert_close(boxes, expected)
        flipped += mirrored
    assert 15 <= flipped <= 45


def test_images_without_boxes_and_untouched_input():
    before = IMAGE.clone()
    transform = DetectionTransform((40, 60), augment=True, normalise=True)
    for seed in range(4):
        torch.manual_seed(seed)
        assert transform(IMAGE, torch.empty(0, 4))[1].shape == (0, 4)
    assert torch.equal(IMAGE, before)
