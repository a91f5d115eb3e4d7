"""The networks of the task fcn by name, each with its recipes."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from torch import nn

from models.fcn.network import FCN
from models.fcn.resnet50 import FCNResNet50
from models.fcn.vgg import FCNVGG
from models.options import Recipe

__all__ = ["AUXILIARY", "NETWORKS", "Network"]

AUXILIARY = 0.5
"""Weight of an auxiliary head's loss, as in torchvision's reference."""


class Network(NamedTuple):
    """One network; it takes images of any height and width from 32 on."""

    build: Callable[[int], nn.Module]
    """From the number of classes, background included."""
    recipes: Mapping[str, Recipe]


_DEFAULT = Recipe(
    batch_size=16, epochs=30, lr=0.02, momentum=0.9, weight_decay=1e-4, schedule="polynomial", warmup_steps=20
)
# Dive into Deep Learning, section 14.11.5, has lr=0.001 and weight_decay=1e-3, but sums over the images of a batch
# what it averages over pixels. Our loss is a mean over the batch too: 32 times smaller. The same update needs a
# learning rate 32 times larger, and a weight decay 32 times smaller, since lr multiplies both. (d2l starts from
# ImageNet's weights and takes void for background; here void is left out.)
_D2L = Recipe(batch_size=32, epochs=5, lr=0.001 * 32, weight_decay=1e-3 / 32)
# No batch norm: from scratch SGD's steps are either too small or too large for some of its layers.
_VGG = Recipe(batch_size=16, epochs=30, optimizer="adam", lr=1e-4, schedule="polynomial", warmup_steps=20)
# For --weights: small steps, and ten times as large ones for what is new.
_FINE = Recipe(
    batch_size=16,
    epochs=30,
    lr=0.002,
    momentum=0.9,
    weight_decay=1e-4,
    schedule="polynomial",
    warmup_steps=20,
)
_FINE_HEADS = replace(_FINE, lr_factors=(("*classifier.*", 10.0),))
_FINE_VGG = replace(_FINE, lr=0.001, lr_factors=(("*score*", 10.0),))

NETWORKS: Mapping[str, Network] = {
    "fcn_resnet18": Network(FCN, {"default": _DEFAULT, "d2l": _D2L, "finetune": _FINE_HEADS}),
    "fcn32s_vgg16": Network(partial(FCNVGG, stride=32), {"default": _VGG, "finetune": _FINE_VGG}),
    "fcn16s_vgg16": Network(partial(FCNVGG, stride=16), {"default": _VGG, "finetune": _FINE_VGG}),
    "fcn8s_vgg16": Network(partial(FCNVGG, stride=8), {"default": _VGG, "finetune": _FINE_VGG}),
    "fcn_resnet50": Network(FCNResNet50, {"default": _DEFAULT, "finetune": _FINE_HEADS}),
}
