"""What ``--download`` fetches: from a server of this machine, where the real ones are in torchvision's tables."""

import hashlib
import io
import pickle
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, voc
from torchvision.models import MobileNet_V3_Small_Weights, mobilenet_v3_small

from launch.config import RunConfig
from launch.data import check_data
from launch.data_config import DataConfig
from launch.downloads import download_data, download_weights, locate_weights, name_or_path
from launch.train import run
from paramserver.errors import ConfigError
from workers.weights import read_weights

NAME = "MobileNet_V3_Small_Weights.IMAGENET1K_V1"


class Site:
    """Serves ``files`` by name and counts what it is asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.lstrip("/")
                site.asked.append(name)
                if name not in site.files:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(site.files[name])))
                self.end_headers()
                self.wfile.write(site.files[name])

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    # Threads stand for processes here, and each puts back what the one before it had set.
    monkeypatch.setattr("launch.downloads.socket.setdefaulttimeout", lambda seconds: None)
    made = Site()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


@pytest.fixture
def weights(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torchvision's weights will lie; the site has them."""
    content = io.BytesIO()
    torch.manual_seed(1)
    torch.save(mobilenet_v3_small().state_dict(), content)
    file = f"mobilenet-{hashlib.sha256(content.getvalue()).hexdigest()[:8]}.pth"
    site.files[file] = content.getvalue()
    monkeypatch.setattr(MobileNet_V3_Small_Weights.IMAGENET1K_V1.value, "url", site.url + file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    return tmp_path / "hub" / "hub" / "checkpoints" / file


def test_weights_come_by_name_once(site: Site, weights: Path) -> None:
    assert download_weights(NAME) == [f"{site.url}{weights.name} was downloaded to {weights}"]
    assert download_weights(NAME) == []
    assert locate_weights(NAME) == weights
    assert name_or_path(NAME) == NAME
    assert torch.equal(read_weights(weights)["features.0.0.weight"], _mobilenet()["features.0.0.weight"])
    assert site.asked == [weights.name]


def _mobilenet() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    state: dict[str, torch.Tensor] = mobilenet_v3_small().state_dict()
    return state


def test_who_wants_the_same_weights_waits_for_the_first(site: Site, weights: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        said = list(pool.map(download_weights, [NAME] * 3))
    assert sorted(map(len, said)) == [0, 0, 1]
    assert site.asked == [weights.name]


def test_nothing_is_downloaded_unasked(site: Site, weights: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^--weights {NAME}: .*say --download .*{weights.name} there$"):
        locate_weights(NAME)
    assert not site.asked


def test_a_run_begins_with_weights_that_it_fetches(site: Site, weights: Path, tmp_path: Path) -> None:
    settings = RunConfig(
        task="classify",
        model="mobilenet_v3_small",
        backend="single",
        weights=NAME,
        download=True,
        image_size=32,
        batch_size=4,
        steps=1,
        evaluate=False,
        lr=0.0,
        out=str(tmp_path),
        name="run",
    )
    run(settings, quiet=True)
    assert "download" not in (tmp_path / "run" / "config.yaml").read_text()
    weights.unlink()
    run(replace(settings, steps=2, resume=str(tmp_path / "run")), quiet=True)
    assert site.asked == [weights.name], "a checkpoint has its own"
    trained = read_weights(tmp_path / "run" / "checkpoints" / "step_1" / "model.safetensors")
    assert torch.equal(trained["features.0.0.weight"], _mobilenet()["features.0.0.weight"])


@pytest.mark.parametrize("damage", ["other content", "no file"])
def test_weights_that_are_not_what_they_should_be_are_not_kept(site: Site, weights: Path, damage: str) -> None:
    if damage == "no file":
        site.files.clear()
    else:
        site.files[weights.name] += b"x"
    with pytest.raises(
        ConfigError, match=rf"^--weights {NAME} cannot be downloaded .*: put {site.url}.* at {weights}$"
    ):
        download_weights(NAME)
    assert not weights.parents[2].exists()


@pytest.mark.parametrize("name", ["ResNet18_Weights.V9", "Nobody_Weights.DEFAULT"])
def test_weights_that_torchvision_does_not_have_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^--weights {name}: torchvision has none of that name"):
        download_weights(name)


@pytest.fixture
def cifar(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The site has a CIFAR-10 of two images a batch, and torchvision's table its checksums."""
    batches = {
        name: pickle.dumps({"data": np.full((2, 3072), number, np.uint8), "labels": [number, 9 - number]})
        for number, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"])
    }
    batches["batches.meta"] = pickle.dumps({"label_names": list("abcdefghij")})
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, text in batches.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))
    site.files["cifar.tar.gz"] = content.getvalue()
    sums = {name: hashlib.md5(text).hexdigest() for name, text in batches.items()}
    monkeypatch.setattr(CIFAR10, "url", site.url + "cifar.tar.gz")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(content.getvalue()).hexdigest())
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in list(batches)[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})


@pytest.mark.usefixtures("cifar")
def test_cifar10_comes_once_whole_and_alone(site: Site, tmp_path: Path) -> None:
    spec = f"cifar10:{tmp_path}/data/cifar"
    (tmp_path / "data").mkdir()
    with ThreadPoolExecutor(2) as pool:
        assert sorted(map(len, pool.map(download_data, [spec] * 2))) == [0, 1]
    assert [path.name for path in (tmp_path / "data" / "cifar").iterdir()] == ["cifar-10-batches-py"]
    asked = len(site.asked)  # torchvision looks first whether it is sent elsewhere
    train, val = check_data(spec, DataConfig(download=True, out=str(tmp_path / "sheet.png")))
    assert (train.images, val.images, train.wrong, val.wrong) == (10, 2, {}, {})
    assert len(site.asked) == asked


@pytest.mark.usefixtures("cifar")
def test_the_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    download_data("cifar10:~/cifar")
    assert [path.name for path in tmp_path.iterdir()] == ["cifar"]


@pytest.mark.usefixtures("cifar")
def test_nothing_is_left_of_data_that_are_not_what_they_should_be(site: Site, tmp_path: Path) -> None:
    site.files["cifar.tar.gz"] += b"x"
    with pytest.raises(ConfigError, match=r"^--data cifar10:.* cannot be downloaded .*: unpack it in .*/new/cifar$"):
        download_data(f"cifar10:{tmp_path}/new/cifar")
    assert not list(tmp_path.iterdir())


def test_voc_comes_with_its_folders(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in ("JPEGImages/a.jpg", "Annotations/a.xml", "ImageSets/Main/train.txt"):
            text = b"a\n"
            entry = tarfile.TarInfo(f"VOCdevkit/VOC2012/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))
    site.files["voc.tar"] = content.getvalue()
    table = {
        "url": site.url + "voc.tar",
        "filename": "voc.tar",
        "md5": hashlib.md5(content.getvalue()).hexdigest(),
        "base_dir": "VOCdevkit/VOC2012",
    }
    monkeypatch.setitem(voc.DATASET_YEAR_DICT, "2012", table)
    download_data(f"voc:{tmp_path}/voc")
    assert sorted(path.name for path in (tmp_path / "voc" / "VOCdevkit" / "VOC2012").iterdir()) == [
        "Annotations",
        "ImageSets",
        "JPEGImages",
    ]
    assert len(list((tmp_path / "voc").iterdir())) == 1


def test_data_that_is_here_stays_as_it_is(site: Site, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine", encoding="utf-8")
    for spec in ("synthetic", f"cifar10:{tmp_path}/mine", f"voc:{tmp_path}/mine", f"banana:{tmp_path}/mine"):
        assert download_data(spec) == []
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes.txt"]


def test_data_of_other_kinds_are_left_to_their_task(tmp_path: Path) -> None:
    assert download_data(f"banana:{tmp_path}/none") == []
    assert download_data(f"mine:{tmp_path}/file.db#3") == []
    assert not list(tmp_path.iterdir())
