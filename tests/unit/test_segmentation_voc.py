"""VOC's segmentation layout: where it may lie, what it may lack, and that each error names its file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.data.segmentation_transforms import SegmentationTransform
from models.data.voc_classes import VOC_CLASSES, VOID, find_voc_root
from models.data.voc_segmentation import VOCSegmentation
from models.errors import DataError

REAL = Path(__file__).parents[3] / "shared" / "data" / "voc_seg" / "VOCdevkit"
WHOLE = SegmentationTransform("val", (32, 32))


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    """Two images of 40 x 50 pixels with labels 0, 1 and void."""
    root = tmp_path / "VOCdevkit" / "VOC2007"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for name in ("a", "b"):
        Image.fromarray(np.full((40, 50, 3), 90, dtype=np.uint8)).save(root / "JPEGImages" / f"{name}.jpg")
        _save_mask(
            root, name, np.repeat(np.array([[0], [1], [VOID], [0]], dtype=np.uint8), 10, axis=0).repeat(50, axis=1)
        )
    (root / "ImageSets" / "Segmentation" / "train.txt").write_text("a\n\nb\n")
    return tmp_path / "VOCdevkit"


def _save_mask(root: Path, name: str, labels: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]") -> None:
    mask = Image.fromarray(labels)
    mask.putpalette(list(range(256)) * 3)
    mask.save(root / "SegmentationClass" / f"{name}.png")


def _open(path: Path, split: str = "train", num_classes: int = 21) -> VOCSegmentation:
    return VOCSegmentation(path, split, num_classes, WHOLE)


def test_each_accepted_path_gives_the_same_samples(devkit: Path) -> None:
    for path in (devkit, devkit / "VOC2007", devkit.parent):
        dataset = _open(path)
        assert len(dataset) == 2
        sample = dataset[1]
        assert sample.id == 1
        assert sample.image.shape == (3, 40, 50)
        assert sample.target["mask"][:, 0].unique(return_counts=True)[1].tolist() == [20, 10, 10]


def test_of_several_years_2012_is_taken_else_the_newest(devkit: Path) -> None:
    (devkit / "VOC2010" / "JPEGImages").mkdir(parents=True)
    assert find_voc_root(devkit).name == "VOC2010"
    for year in ("VOC2012", "VOC2014"):
        (devkit / year / "JPEGImages").mkdir(parents=True)
    assert find_voc_root(devkit).name == "VOC2012"


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds neither JPEGImages nor VOC20xx"):
        _open(tmp_path)


def test_a_missing_list_is_named_with_those_that_exist(devkit: Path) -> None:
    with pytest.raises(DataError, match=r"test\.txt \(lists that exist: train\).*--split-val"):
        _open(devkit, "test")


def test_an_empty_list_is_refused(devkit: Path) -> None:
    (devkit / "VOC2007" / "ImageSets" / "Segmentation" / "val.txt").write_text("\n")
    with pytest.raises(DataError, match=r"val\.txt lists no image"):
        _open(devkit, "val")


@pytest.mark.parametrize("file", ["JPEGImages/b.jpg", "SegmentationClass/b.png"])
def test_a_missing_file_is_named_at_once(devkit: Path, file: str) -> None:
    (devkit / "VOC2007" / file).unlink()
    with pytest.raises(DataError, match=file):
        _open(devkit)


@pytest.mark.parametrize("file", ["JPEGImages/b.jpg", "SegmentationClass/b.png"])
def test_a_broken_file_is_named_when_read(devkit: Path, file: str) -> None:
    (devkit / "VOC2007" / file).write_bytes(b"not a picture")
    with pytest.raises(DataError, match=file):
        _open(devkit)[1]


def test_a_mask_of_another_size_is_named(devkit: Path) -> None:
    _save_mask(devkit / "VOC2007", "a", np.zeros((50, 40), dtype=np.uint8))
    with pytest.raises(DataError, match=r"a\.png has 50x40 pixels, but a\.jpg has 40x50"):
        _open(devkit)[0]


def test_a_label_out_of_range_is_named_with_the_remedy(devkit: Path) -> None:
    labels = np.zeros((40, 50), dtype=np.uint8)
    labels[3, 3] = 9
    _save_mask(devkit / "VOC2007", "a", labels)
    with pytest.raises(DataError, match=r"a\.png has label 9, but the labels of 9 classes.*--classes"):
        _open(devkit, num_classes=9)[0]
    assert _open(devkit, num_classes=10)[0].target["mask"][3, 3] == 9


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the VOC 2012 excerpt is not at {REAL}")
def test_a_real_excerpt_of_voc_2012() -> None:
    for split in ("train", "val"):
        dataset = _open(REAL, split, len(VOC_CLASSES) + 1)
        assert len(dataset) == 100
        for index in (0, 50, 99):
            sample = dataset[index]
            assert sample.image.shape[1:] == sample.target["mask"].shape
            assert torch.isin(sample.target["mask"], torch.tensor([*range(21), VOID])).all()
