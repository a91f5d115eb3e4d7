"""On CUDA, too, any number of workers and servers gives the bits of one process: they share a GPU here."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.runs import HARD, SMALL, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CASES: list[dict[str, Any]] = [
    {"workers": 1, "servers": 1},
    {"workers": 2, "servers": 1, "overlap": True},
    {"workers": 3, "servers": 2, "overlap": True, "early_forward": True},
    {"workers": 4, "servers": 1, "early_forward": True},
    {"workers": 2, "servers": 2, "transport": "ray"},
]

NETWORKS: dict[str, dict[str, Any]] = {
    "ssd300_vgg16": {"task": "ssd", "image_size": "300", "lr": 1e-3},
    "ssd300_resnet50": {"task": "ssd", "image_size": "300", "lr": 1e-3},
    "fcn8s_vgg16": {"task": "fcn", "image_size": "64", "lr": 1e-3},
    "fcn_resnet50": {"task": "fcn", "image_size": "64", "lr": 1e-3},
    "efficientnet_b4": {"task": "classify", "image_size": "64", "lr": 1e-3},  # too long for a stream's queue
}
LARGE = [*((model, "fp32") for model in NETWORKS), ("ssd300_resnet50", "bf16"), ("fcn_resnet50", "fp16")]


@pytest.mark.parametrize("task", SMALL)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(f"{name}={value}" for name, value in case.items()))
def test_same_bits_as_single_on_a_gpu(ray_cluster: None, tmp_path: Path, task: str, case: dict[str, Any]) -> None:
    settings = {**SMALL[task], **HARD, "device": "cuda"}
    single = train(tmp_path, "single", backend="single", **settings)
    several = train(tmp_path, "ps", in_session=True, backend="ps", share_device=True, **settings, **case)
    assert several.summary["state_fingerprint"] == single.summary["state_fingerprint"]
    assert several.summary["loss"] == single.summary["loss"]


@pytest.mark.parametrize("task", SMALL)
def test_one_ddp_rank_has_the_bits_of_single_on_a_gpu(tmp_path: Path, task: str) -> None:
    settings = {**SMALL[task], **HARD, "device": "cuda", "microbatches": 1}
    single = train(tmp_path, "single", backend="single", **settings)
    ddp = train(tmp_path, "ddp", backend="ddp", workers=1, **settings)
    assert ddp.summary["state_fingerprint"] == single.summary["state_fingerprint"]


@pytest.mark.parametrize(("model", "precision"), LARGE)
def test_large_networks_have_the_same_bits_in_two_workers(
    ray_cluster: None, tmp_path: Path, model: str, precision: str
) -> None:
    few = {"batch_size": 5, "microbatches": 2, "steps": 3, "warmup_steps": 0, "precision": precision}
    settings = {**HARD, **NETWORKS[model], **few, "model": model, "device": "cuda", "channels_last": True}
    single = train(tmp_path, "single", backend="single", **settings)
    several = train(tmp_path, "ps", in_session=True, backend="ps", workers=2, share_device=True, **settings)
    assert several.summary["state_fingerprint"] == single.summary["state_fingerprint"]
    assert several.summary["loss"] == single.summary["loss"]
