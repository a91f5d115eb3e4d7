"""What keeps decoded images keeps no more than it may, and another process's copy begins with nothing."""

import pickle
from pathlib import Path

import torch
from torch import Tensor

from models.data.images import DecodedImages


class _Files:
    """Counts how often each is decoded."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def decode(self, path: Path) -> Tensor:
        self.asked.append(path.name)
        return torch.full((10,), len(path.name), dtype=torch.uint8)


def test_what_fits_is_decoded_once_and_the_first_stay() -> None:
    files, images = _Files(), DecodedImages(25)
    for _ in range(2):
        for name in ("a", "b", "c"):
            assert images.get(Path(name), files.decode).tolist() == [1] * 10
    assert files.asked == ["a", "b", "c", "c"]


def test_by_default_nothing_is_kept() -> None:
    files, images = _Files(), DecodedImages()
    for _ in range(2):
        images.get(Path("a"), files.decode)
    assert files.asked == ["a", "a"]


def test_a_copy_in_another_process_begins_with_nothing() -> None:
    files, images = _Files(), DecodedImages(100)
    images.get(Path("a"), files.decode)
    copy = pickle.loads(pickle.dumps(images))
    copy.get(Path("a"), files.decode)
    copy.get(Path("a"), files.decode)
    assert files.asked == ["a", "a"]
