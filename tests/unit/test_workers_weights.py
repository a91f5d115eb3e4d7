"""--weights: what a file has goes where it fits, and what does not is told."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torchvision.models import resnet18, vgg16

from launch.config import RunConfig
from launch.train import run
from models.fcn.network import FCN
from models.fcn.vgg import FCNVGG
from models.ssd.ssd300 import ssd300_vgg16
from paramserver.errors import ConfigError
from workers.weights import fit_weights, read_weights


def test_both_kinds_of_file_are_read(tmp_path: Path) -> None:
    state = nn.Linear(3, 2).state_dict()
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, tmp_path / "a.pth")
    safetensors.torch.save_file(state, tmp_path / "b.safetensors")
    for name in ("a.pth", "b.safetensors"):
        read = read_weights(tmp_path / name)
        assert read.keys() == state.keys()
        assert all(torch.equal(read[key], state[key]) for key in state)


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('unpickled')",)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    torch.save({"model": _Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ConfigError, match=r"--weights .*evil.pth holds more than tensors"):
        read_weights(tmp_path / "evil.pth")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "no such file; torchvision's have names"),
        ([1, 2], "holds no state dict"),
        ({"bias": torch.eye(2).to_sparse()}, "bias is no plain tensor"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: object, complaint: str) -> None:
    if content is not None:
        torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=complaint):
        read_weights(tmp_path / "w.pt")
    with pytest.raises(ConfigError, match="is a folder: name a file"):
        read_weights(tmp_path)
    (tmp_path / "page.pth").write_text("<!doctype html><html></html>", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"page\.pth cannot be read"):
        read_weights(tmp_path / "page.pth")


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    state = FCN(3).state_dict()
    state["backbone.bn1.bias"][1] = float("nan")
    torch.save({**state, "mask": torch.tensor([float("-inf")])}, tmp_path / "w.pt")  # what fits alone matters
    settings = RunConfig(
        task="fcn", backend="single", steps=1, weights=str(tmp_path / "w.pt"), out=str(tmp_path / "runs"), image_size=32
    )
    with pytest.raises(ConfigError, match=r"w\.pt: backbone\.bn1\.bias holds what is not finite"):
        run(settings, quiet=True)
    assert not (tmp_path / "runs").exists()


def test_a_head_of_another_number_of_classes_keeps_its_initial_values() -> None:
    fitted = fit_weights(FCN(5).state_dict(), FCN(21).state_dict())
    assert fitted.reshaped == ["classifier.weight", "classifier.bias", "upsample.weight", "upsample.bias"]
    assert fitted.missing == fitted.unused == []
    assert "4 of another shape, so at their initial values: classifier.weight" in fitted.describe()


def test_a_backbone_is_found_by_its_prefix() -> None:
    torch.manual_seed(0)
    backbone = resnet18(weights=None).state_dict()
    own = FCN(5).state_dict()
    fitted = fit_weights(own, backbone)
    assert fitted.unused == ["fc.weight", "fc.bias"]
    assert sorted(fitted.values) == sorted(key for key in own if key.startswith("backbone."))
    assert torch.equal(fitted.values["backbone.layer4.1.conv2.weight"], backbone["layer4.1.conv2.weight"])


def test_fully_connected_layers_become_convolutions() -> None:
    with torch.device("meta"):
        own, stored = FCNVGG(3, stride=8), vgg16(weights=None).state_dict()
    stored["classifier.0.weight"] = torch.arange(4096 * 25088, dtype=torch.float32).view(4096, 25088)
    fitted = fit_weights(own.state_dict(), stored, own.weight_aliases)
    assert fitted.unused == ["classifier.6.weight", "classifier.6.bias"]
    assert fitted.values["fc6.weight"].shape == (4096, 512, 7, 7)
    assert fitted.values["fc6.weight"][1, 0, 0, :2].tolist() == [25088.0, 25089.0]
    assert not [key for key in fitted.missing if key.startswith(("features", "fc"))]


def test_vgg16_fits_into_ssd300() -> None:
    with torch.device("meta"):
        own, stored = ssd300_vgg16(3), vgg16(weights=None).state_dict()
    fitted = fit_weights(own.state_dict(), stored, own.weight_aliases)
    assert fitted.unused == [f"classifier.{i}.{name}" for i in (0, 3, 6) for name in ("weight", "bias")]
    assert len(fitted.values) == 26, "thirteen convolutions"
    assert {
        "backbone.features.0.weight",
        "backbone.extra.0.1.weight",
        "backbone.extra.0.5.bias",
    } <= fitted.values.keys()
