"""FCN on VGG16 and on ResNet-50: sizes, skips, upsampling, torchvision's keys, and the auxiliary head's loss."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import vgg16
from torchvision.models.segmentation import fcn_resnet50 as torchvision_fcn

from models.data.voc_classes import VOID
from models.fcn.network import enlarged
from models.fcn.networks import NETWORKS
from models.fcn.resnet50 import FCNResNet50
from models.fcn.task import FCNTask
from models.fcn.vgg import FCNVGG
from models.options import TaskOptions
from models.task import Batch


@pytest.fixture(scope="module")
def fcn8s() -> FCNVGG:
    torch.manual_seed(0)
    return FCNVGG(3, stride=8).eval()


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (33, 95)])
def test_output_has_the_size_of_the_image(fcn8s: FCNVGG, size: tuple[int, int]) -> None:
    assert fcn8s(torch.randn(1, 3, *size)).shape == (1, 3, *size)


def test_keys_of_vgg16(fcn8s: FCNVGG) -> None:
    with torch.device("meta"):
        theirs = vgg16(weights=None).state_dict()
    ours = fcn8s.state_dict()
    features = {key: value.shape for key, value in theirs.items() if key.startswith("features.")}
    assert {key: value.shape for key, value in ours.items() if key.startswith("features.")} == features
    assert ours["fc6.weight"].numel() == theirs["classifier.0.weight"].numel()
    assert ours["fc7.weight"].numel() == theirs["classifier.3.weight"].numel()


@torch.no_grad()
@pytest.mark.parametrize("factor", [2, 8])
def test_upsampling_starts_as_bilinear_interpolation(fcn8s: FCNVGG, factor: int) -> None:
    layer = fcn8s.upsample if factor == 8 else fcn8s.upsample_skips["pool4"]
    scores = torch.randn(1, 3, 5, 6)
    expected = F.interpolate(scores, scale_factor=factor, mode="bilinear", align_corners=False)
    rim = factor // 2  # where a transposed convolution fades to zero instead of repeating the last cell
    interior = (..., slice(rim, -rim), slice(rim, -rim))
    torch.testing.assert_close(layer(scores)[interior], expected[interior], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [(5, 6), (40, 45), (33, 95), (3, 4)])
def test_enlarged_is_interpolation_with_its_gradient(size: tuple[int, int]) -> None:
    scores = torch.randn(2, 3, 5, 6, requires_grad=True)
    upstream = torch.randn(2, 3, *size)
    expected = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
    (gradient,) = torch.autograd.grad(expected, scores, upstream)
    found = enlarged(scores, *size)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, scores, upstream)[0], gradient)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(enlarged(scores, *size), expected)


@torch.no_grad()
def test_it_begins_as_if_there_were_no_skips(fcn8s: FCNVGG) -> None:
    """Zero scores of pool3 and pool4 leave what two bilinear upsamplings and one by eight make of the coarsest."""
    seen = {}
    handle = fcn8s.score.register_forward_hook(lambda *found: seen.update(score=found[2]))
    logits = fcn8s(torch.randn(1, 3, 96, 128))
    handle.remove()
    assert seen["score"].shape == (1, 3, 3, 4)
    twice = fcn8s.upsample_skips["pool3"](fcn8s.upsample_skips["pool4"](seen["score"]))
    torch.testing.assert_close(logits, fcn8s.upsample(twice))


@torch.no_grad()
@pytest.mark.parametrize(("stride", "pools"), [(32, []), (16, ["pool4"]), (8, ["pool4", "pool3"])])
def test_which_pools_are_scored(stride: int, pools: list[str]) -> None:
    with torch.device("meta"):
        network = FCNVGG(3, stride=stride)
        shape = network(torch.empty(1, 3, 64, 96)).shape
    assert list(network.skip_scores) == pools
    assert shape == (1, 3, 64, 96)


def test_resnet50_has_torchvisions_keys_and_loss() -> None:
    torch.manual_seed(0)
    task = FCNTask(TaskOptions(model="fcn_resnet50"))
    network = task.build_model()
    assert isinstance(network, FCNResNet50)
    classes = len(task.class_names)
    theirs = torchvision_fcn(weights=None, weights_backbone=None, num_classes=classes, aux_loss=True).train()
    theirs.load_state_dict(network.state_dict())
    images, mask = torch.randn(2, 3, 64, 64), torch.randint(0, classes, (2, 64, 64), dtype=torch.uint8)
    mask[0, :9] = VOID
    torch.manual_seed(1)  # dropout
    found = theirs(images)
    losses = [F.cross_entropy(found[name], mask.long(), ignore_index=VOID) for name in ("out", "aux")]
    torch.manual_seed(1)
    total, weight = task.loss(network.train(), Batch(images, {"mask": mask}, torch.arange(2)))
    torch.testing.assert_close(total / weight.float(), losses[0] + 0.5 * losses[1], check_dtype=False)
    assert task.predict(network.eval(), Batch(images, {}, torch.arange(2))).shape == (2, 64, 64)


def test_every_network_has_a_default_recipe() -> None:
    assert all("default" in network.recipes for network in NETWORKS.values())
