"""``--data`` and the reading of image files: every error names the thing and the remedy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.data.images import read_image, read_mask
from models.data.spec import DataSpec, parse_data_spec
from models.errors import DataError


def test_every_form_is_parsed(tmp_path: Path) -> None:
    assert parse_data_spec("synthetic", ("synthetic", "voc")).kind == "synthetic"
    assert parse_data_spec(f"voc:{tmp_path}", ("voc",)) == DataSpec("voc", tmp_path)
    assert parse_data_spec(f"banana:{tmp_path}", ("banana",)) == DataSpec("banana", tmp_path)


def test_a_path_may_hold_a_colon(tmp_path: Path) -> None:
    folder = tmp_path / "a:b"
    folder.mkdir()
    assert parse_data_spec(f"voc:{folder}", ("voc",)).path == folder


def test_the_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_data_spec("voc:~", ("voc",)).path == tmp_path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("coco:.", "'coco:.' is not understood here: use one of synthetic, voc:PATH"),
        ("banana:.", "use one of synthetic, voc:PATH"),
        ("", "is not understood here"),
        ("synthetic:5", "synthetic takes no path"),
        ("voc", "write voc:PATH"),
        ("voc:/no/such/folder", "no such folder: /no/such/folder"),
    ],
)
def test_a_wrong_spec_is_a_data_error(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_data_spec(text, ("synthetic", "voc"))


def test_images_come_as_rgb_bytes(tmp_path: Path) -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    image = read_image(tmp_path / "grey.png")
    assert image.shape == (3, 3, 4)
    assert torch.equal(image[2], torch.from_numpy(grey))


def test_16_bits_come_as_their_upper_half(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 255, 256, 40_000, 65_535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png")[0].tolist() == [[0, 0, 1, 156, 255]]
    Image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(DataError, match=r"float\.tiff has mode F: save it as a PNG of 8 or 16 bits"):
        read_image(tmp_path / "float.tiff")


def test_a_palette_mask_comes_as_indices(tmp_path: Path) -> None:
    mask = Image.fromarray(np.array([[0, 7, 255]], dtype=np.uint8))
    mask.putpalette(list(range(255, -1, -1)) * 3)
    mask.save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png").tolist() == [[0, 7, 255]]


@pytest.mark.parametrize("read", [read_image, read_mask])
def test_a_bad_file_is_named(tmp_path: Path, read: object) -> None:
    assert callable(read)
    with pytest.raises(DataError, match=r"missing image: .*gone\.png"):
        read(tmp_path / "gone.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(DataError, match=r"broken image: .*text\.png"):
        read(tmp_path / "text.png")
    Image.fromarray(np.zeros((64, 64), dtype=np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"broken image: .*cut\.png"):
        read(tmp_path / "cut.png")


def test_a_colour_image_is_no_mask(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(tmp_path / "colour.png")
    with pytest.raises(DataError, match=r"colour\.png has mode RGB: a mask must be"):
        read_mask(tmp_path / "colour.png")
