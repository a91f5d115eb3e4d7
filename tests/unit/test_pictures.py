"""Pictures put together."""

import torch

from models.pictures import contact_sheet


def _plain(height: int, width: int, value: int) -> torch.Tensor:
    return torch.full((3, height, width), value, dtype=torch.uint8)


def test_cells_are_as_large_as_the_largest_picture_and_no_larger() -> None:
    sheet = contact_sheet([_plain(10, 40, 0), _plain(20, 40, 50), _plain(100, 400, 90)], columns=2, side=40)
    gap = 4
    assert sheet.shape == (3, 2 * 20 + 3 * gap, 2 * 40 + 3 * gap)
    assert (sheet[:, gap + 5 : gap + 15, gap : gap + 40] == 0).all(), "in the middle of its cell"
    assert (sheet[:, gap : gap + 20, 40 + 2 * gap : 80 + 2 * gap] == 50).all()
    assert (sheet[:, 20 + 2 * gap + 5 : 20 + 2 * gap + 15, gap : gap + 40] == 90).all(), "made smaller"
    assert (sheet[:, : gap + 5] == 255)[..., : gap + 40].all(), "white around it"
