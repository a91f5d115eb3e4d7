"""Images and masks in two folders: values, colours, void, and what is wrong with them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.data.mask_folders import MaskFolders, read_label_table
from models.data.segmentation_transforms import SegmentationTransform
from models.data.voc_classes import VOID
from models.errors import DataError
from models.fcn.task import FCNTask
from models.options import TaskOptions

WHOLE = SegmentationTransform("val", (32, 32))
IDS = "name,id\nroad,7\ncar,200\nvoid,0\n"
COLOURS = "name, r, g, b\nroad,10,20,30\ncar,0,0,250\nVoid,0,0,0\n"


def _write(root: Path, table: str, *, coloured: bool) -> Path:
    (root / "classes.csv").write_text(table)
    values = np.repeat(np.array([[7], [200], [0], [7]], dtype=np.uint8), 10, axis=0).repeat(50, axis=1)
    if coloured:
        meant = {7: (10, 20, 30), 200: (0, 0, 250), 0: (0, 0, 0)}
        values = np.array([[meant[int(value)] for value in row] for row in values], dtype=np.uint8)
    for split in ("train", "val"):
        for name in ("images", "masks"):
            (root / split / name).mkdir(parents=True)
        Image.new("RGB", (50, 40)).save(root / split / "images" / "a.jpg")
        Image.fromarray(values).save(root / split / "masks" / "a.png")
    return root


@pytest.mark.parametrize(("table", "coloured"), [(IDS, False), (COLOURS, True)])
def test_values_and_colours_become_labels(tmp_path: Path, table: str, coloured: bool) -> None:
    root = _write(tmp_path, table, coloured=coloured)
    task = FCNTask(TaskOptions(data=f"masks:{root}", image_size=(32, 32)))
    assert task.class_names == ("road", "car")
    mask = task.build_dataset("val")[0].target["mask"]
    assert mask[[0, 10, 20, 30], 0].tolist() == [0, 1, VOID, 0]


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing .*classes\.csv"):
        read_label_table(tmp_path)
    root = _write(tmp_path, IDS, coloured=False)
    table = read_label_table(root)
    (root / "classes.csv").write_text("name,id\nroad,7\ncar,8\nvoid,0\n")
    with pytest.raises(DataError, match=r"a\.png holds 200, which classes\.csv does not name"):
        MaskFolders(root, "train", read_label_table(root), WHOLE)[0]
    (root / "classes.csv").write_text("name,id\nroad,x\n")
    with pytest.raises(DataError, match=r"classes\.csv, line 2: what is not the name must be numbers"):
        read_label_table(root)
    (root / "classes.csv").write_text("name,id\nroad,7\ncar,8\nroad,9\n")
    merged = read_label_table(root)
    assert (merged.names, merged.ids) == (("road", "car"), {7: 0, 8: 1, 9: 0})
    for twice in ("name,id\nroad,7\ncar,7\n", "name,r,g,b\nroad,0,0,7\ncar,0,0,7\n"):
        (root / "classes.csv").write_text(twice)
        with pytest.raises(DataError, match="line 3: another line has the same id or colour"):
            read_label_table(root)
    (root / "classes.csv").write_text("label,colour\n")
    with pytest.raises(DataError, match=r"first line must be name,id or name,r,g,b, not label,colour"):
        read_label_table(root)
    Image.new("L", (20, 40)).save(root / "train" / "masks" / "a.png")
    with pytest.raises(DataError, match="40x20 pixels, its image 40x50"):
        MaskFolders(root, "train", table, WHOLE)[0]
    (root / "train" / "masks" / "a.png").rename(root / "train" / "masks" / "b.png")
    with pytest.raises(DataError, match=r"a\.jpg has no mask in"):
        MaskFolders(root, "train", table, WHOLE)


def test_a_coloured_mask_for_ids_is_refused(tmp_path: Path) -> None:
    root = _write(tmp_path, IDS, coloured=True)
    with pytest.raises(DataError, match=r"has mode RGB, but classes\.csv has ids"):
        MaskFolders(root, "train", read_label_table(root), WHOLE)[0]
