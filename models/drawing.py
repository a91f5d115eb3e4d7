"""Drawing into pictures: boxes with texts, tinted masks, a line of text; sizes follow those of the picture."""

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.utils import draw_segmentation_masks

__all__ = ["Colour", "class_colour", "draw_boxes", "draw_masks", "draw_text", "load_font"]

Colour = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""

_COLOURS: tuple[Colour, ...] = (
    (230, 25, 75),
    (0, 130, 200),
    (255, 215, 0),
    (60, 180, 75),
    (245, 130, 48),
    (70, 240, 240),
    (240, 50, 230),
    (145, 30, 180),
    (170, 255, 195),
    (128, 0, 0),
    (250, 190, 212),
    (0, 0, 160),
)
"""Far from each other, the first ones also for who does not tell red from green (after S. Trubetskoy's list)."""
_FONT = Path("mpl-data", "fonts", "ttf", "DejaVuSans.ttf")
_MIN_TEXT, _TEXT = 11, 0.03  # height of letters: pixels at least, and part of the picture's shorter side
_LINE = 1 / 200
_SMALL, _ENLARGED = 48, 4  # CIFAR-10's 32 pixels have no room for a name
_TINT = 0.6  # part of a mask's colour in what it covers
_DARK, _LIGHT = (0, 0, 0), (255, 255, 255)


def class_colour(label: int) -> Colour:
    """The colour of a class, the same in every picture; from the thirteenth on colours come again."""
    return _COLOURS[label % len(_COLOURS)]


@lru_cache(maxsize=32)
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Letters of ``size`` pixels.

    Matplotlib's, which has Latin, Greek and Cyrillic letters: Pillow's own font knows no more than ASCII.
    """
    found = importlib.util.find_spec("matplotlib")
    assert found is not None
    assert found.submodule_search_locations
    return ImageFont.truetype(str(Path(found.submodule_search_locations[0]) / _FONT), size)


def draw_boxes(image: Tensor, boxes_G4: Tensor, texts: Sequence[str], colours: Sequence[Colour]) -> Tensor:
    """Draw boxes with a text each.

    Args:
        image: (3, H, W) uint8; left as it is.
        boxes_G4: (G, 4) corners as parts of width and height.
        texts: of each box; it stands above the box, or in it where there is no room.
        colours: of each box.

    Returns:
        A (3, H, W) uint8 copy.
    """
    if not texts:
        return image.clone()
    canvas = _to_pil(image)
    draw, font = ImageDraw.Draw(canvas), load_font(_text_size(image))
    line = max(2, round(min(canvas.size) * _LINE))
    corners = [_in_pixels(box, canvas.size) for box in boxes_G4.detach().cpu().clamp(0, 1).tolist()]
    for box, colour in zip(corners, colours, strict=True):
        draw.rectangle(box, outline=colour, width=line)
    # After all boxes, so that no line goes through a text; the first box is the surest, so its text lies on top.
    for (x, y, *_), text, colour in reversed(list(zip(corners, texts, colours, strict=True))):
        _put(draw, font, text, (x, y), colour)
    return _to_tensor(canvas)


def draw_text(image: Tensor, text: str, colour: Colour) -> Tensor:
    """A copy of the (3, H, W) uint8 ``image`` with a text in its upper left corner; a very small one is enlarged."""
    if min(image.shape[-2:]) < _SMALL:
        image = image.repeat_interleave(_ENLARGED, dim=1).repeat_interleave(_ENLARGED, dim=2)
    canvas = _to_pil(image)
    _put(ImageDraw.Draw(canvas), load_font(_text_size(image)), text, (0, 0), colour)
    return _to_tensor(canvas)


def draw_masks(image: Tensor, labels_HW: Tensor, colours: Sequence[Colour]) -> Tensor:
    """A copy of the (3, H, W) uint8 ``image``, tinted where ``labels_HW`` is not 0, by the colour of each label."""
    present = [label for label in torch.unique(labels_HW).tolist() if label != 0]
    if not present:
        return image.clone()
    masks = (labels_HW[None] == labels_HW.new_tensor(present)[:, None, None]).to(image.device)
    drawn: Tensor = draw_segmentation_masks(image, masks, alpha=_TINT, colors=[colours[label] for label in present])
    return drawn


def _to_tensor(canvas: Image.Image) -> Tensor:
    image: Tensor = pil_to_tensor(canvas)
    return image


def _to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def _text_size(image: Tensor) -> int:
    return max(_MIN_TEXT, round(_TEXT * min(image.shape[-2:])))


def _in_pixels(box: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """First and last column and row, at least a pixel each."""
    x1, y1 = (min(int(part * side), side - 1) for part, side in zip(box[:2], size, strict=True))
    x2, y2 = (round(part * side) - 1 for part, side in zip(box[2:], size, strict=True))
    return x1, y1, max(x1, x2), max(y1, y2)


def _put(
    draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, text: str, corner: tuple[int, int], colour: Colour
) -> None:
    """A text on a ground of ``colour`` above a corner, moved so far that nothing of it is cut off."""
    pad = max(1, round(font.size) // 8)
    ascent, descent = font.getmetrics()
    width, height = round(font.getlength(text)) + 2 * pad, ascent + descent
    x = max(0, min(corner[0], draw.im.size[0] - width))
    y = corner[1] - height if corner[1] >= height else corner[1]
    y = max(0, min(y, draw.im.size[1] - height))
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
    red, green, blue = colour
    bright = 299 * red + 587 * green + 114 * blue > 128_000  # ITU-R 601
    draw.text((x + pad, y), text, font=font, fill=_DARK if bright else _LIGHT)
