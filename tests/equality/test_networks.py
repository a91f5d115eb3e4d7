"""Every network trains to the same bits on one device, on a parameter server and under DDP."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import summary_of, train
from tests.support.torchrun import run_ddp_cases

NETWORKS: dict[str, dict[str, Any]] = {
    "lenet": {"task": "classify"},
    "resnet18": {"task": "classify", "image_size": 64},
    "mobilenet_v3_small": {"task": "classify", "image_size": 64},
    "vit_b_16": {"task": "classify", "image_size": 32, "lr": 0.001},
    "ssd300_vgg16": {"task": "ssd", "lr": 0.001},
    "ssd300_resnet50": {"task": "ssd", "lr": 0.001, "batch_size": 9},  # its last batch norm sees a value an image
    "fasterrcnn_mobilenet_v3_large_320_fpn": {"task": "rcnn", "image_size": 64, "lr": 0.001},
    "maskrcnn_resnet50_fpn": {"task": "rcnn", "image_size": 64, "lr": 0.001},
    "fcn32s_vgg16": {"task": "fcn", "image_size": "48x64"},
    "fcn16s_vgg16": {"task": "fcn", "image_size": "48x64"},
    "fcn8s_vgg16": {"task": "fcn", "image_size": "48x64"},
    "fcn_resnet50": {"task": "fcn", "image_size": "48x64", "lr": 0.001},
}
STEPS: dict[str, Any] = {"batch_size": 7, "microbatches": 4, "steps": 3, "seed": 1, "evaluate": False}


@pytest.mark.parametrize(
    "name", [name if name == "lenet" else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]
)
def test_same_bits_on_every_backend(ray_cluster: None, tmp_path: Path, name: str) -> None:
    case = {**STEPS, **NETWORKS[name], "model": name}
    single = summary_of(tmp_path, "single", backend="single", **case)
    assert single["loss"]["first"] == single["loss"]["first"], "a number"
    ps = train(tmp_path, "ps", in_session=True, backend="ps", workers=2, **case).summary
    assert ps["state_fingerprint"] == single["state_fingerprint"]
    assert ps["loss"] == single["loss"]
    (ddp,) = run_ddp_cases(tmp_path, 2, [case])
    assert ddp["fingerprint"] == single["fingerprint"]
