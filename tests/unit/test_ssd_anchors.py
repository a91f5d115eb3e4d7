import pytest
import torch

from models.ssd.anchors import RATIOS, SIZES, anchors, feature_maps, prior_boxes


def test_number_and_cache():
    boxes = anchors(256, 256)
    assert boxes.shape == (5444, 4)
    assert boxes.dtype == torch.float32
    assert anchors(256, 256) is boxes
    assert sum(h * w * 4 for h, w in feature_maps(256, 256)) == 5444


def test_values_of_the_books_example():
    # An image of 561 x 728 pixels, sizes 0.75, 0.5, 0.25 and ratios 1, 2, 0.5: five anchors a pixel.
    boxes = prior_boxes(561, 728, (0.75, 0.5, 0.25), (1.0, 2.0, 0.5))
    assert boxes.shape == (2_042_040, 4)
    first = boxes.reshape(561, 728, 5, 4)[250, 250, 0]
    torch.testing.assert_close(first, torch.tensor([0.06, 0.07, 0.63, 0.82]), atol=0.005, rtol=0)


def test_order_worked_by_hand():
    # Two rows, one column: anchors are twice as wide in parts of the width as a square would be in parts of the height.
    boxes = prior_boxes(2, 1, (0.2, 0.4), (1.0, 4.0))
    expected = [
        [0.5 - 0.2, 0.25 - 0.1, 0.5 + 0.2, 0.25 + 0.1],
        [0.5 - 0.4, 0.25 - 0.2, 0.5 + 0.4, 0.25 + 0.2],
        [0.5 - 0.4, 0.25 - 0.05, 0.5 + 0.4, 0.25 + 0.05],
    ]
    expected += [[x1, y1 + 0.5, x2, y2 + 0.5] for x1, y1, x2, y2 in expected]
    torch.testing.assert_close(boxes, torch.tensor(expected))


def _multibox_prior(height, width, sizes, ratios):
    """The book's function, for a feature map."""
    per_pixel = len(sizes) + len(ratios) - 1
    size, ratio = torch.tensor(sizes), torch.tensor(ratios)
    center_h = (torch.arange(height) + 0.5) * (1.0 / height)
    center_w = (torch.arange(width) + 0.5) * (1.0 / width)
    shift_y, shift_x = (shift.reshape(-1) for shift in torch.meshgrid(center_h, center_w, indexing="ij"))
    w = torch.cat((size * torch.sqrt(ratio[0]), sizes[0] * torch.sqrt(ratio[1:]))) * height / width
    h = torch.cat((size / torch.sqrt(ratio[0]), sizes[0] / torch.sqrt(ratio[1:])))
    manipulations = torch.stack((-w, -h, w, h)).T.repeat(height * width, 1) / 2
    grid = torch.stack([shift_x, shift_y, shift_x, shift_y], dim=1).repeat_interleave(per_pixel, dim=0)
    return grid + manipulations


def test_all_equal_the_books_to_the_bit():
    maps = feature_maps(256, 192)
    expected = [_multibox_prior(*map_, sizes, ratios) for map_, sizes, ratios in zip(maps, SIZES, RATIOS, strict=True)]
    assert torch.equal(anchors(256, 192), torch.cat(expected))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 200), (255, 257), (300, 300)])
def test_other_image_sizes(height, width):
    assert anchors(height, width).shape[0] == sum(h * w * 4 for h, w in feature_maps(height, width))


def test_usable_in_training_after_inference_mode_asked_first():
    with torch.inference_mode():
        boxes = anchors(64, 80)
    assert not boxes.is_inference()
