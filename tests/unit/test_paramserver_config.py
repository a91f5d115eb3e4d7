"""Learning rates at known steps, and every setting that is refused."""

import math
from typing import Any

import pytest

from paramserver.config import OptimizerConfig
from paramserver.errors import ConfigError


def rates(steps: list[int], **settings: Any) -> list[float]:
    config = OptimizerConfig(**settings)
    return [config.learning_rate(step) for step in steps]


def test_constant_is_constant() -> None:
    assert rates([0, 1, 99], lr=0.5, total_steps=100) == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("schedule", ["constant", "step", "cosine", "polynomial"])
def test_warm_up_rises_linearly_to_the_peak(schedule: str) -> None:
    expected = [0.25, 0.5, 0.75, 1.0, 1.0]
    got = rates([0, 1, 2, 3, 4], lr=1.0, warmup_steps=4, total_steps=1000, schedule=schedule)
    assert got == expected


def test_step_multiplies_every_decay_steps() -> None:
    steps = [0, 9, 10, 19, 20]
    got = rates(steps, lr=1.0, schedule="step", total_steps=30, decay_steps=10, decay_factor=0.5)
    assert got == [1.0, 1.0, 0.5, 0.5, 0.25]


def test_step_takes_a_third_of_the_run_by_default_and_counts_from_the_end_of_the_warm_up() -> None:
    settings = {"lr": 1.0, "schedule": "step", "total_steps": 32, "warmup_steps": 2, "decay_factor": 0.5}
    assert rates([2, 11, 12, 21, 22, 31], **settings) == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]


def test_cosine_at_start_middle_and_end() -> None:
    got = rates([0, 25, 50, 100, 150], lr=2.0, schedule="cosine", total_steps=100)
    assert got == pytest.approx([2.0, 1.0 + math.cos(math.pi / 4), 1.0, 0.0, 0.0], abs=1e-12)
    assert got[0] == 2.0


def test_cosine_begins_after_the_warm_up() -> None:
    got = rates([10, 60, 110], lr=2.0, schedule="cosine", total_steps=110, warmup_steps=10)
    assert got == pytest.approx([2.0, 1.0, 0.0], abs=1e-12)


def test_polynomial_at_start_middle_and_end() -> None:
    assert rates([0, 50, 100, 101], lr=2.0, schedule="polynomial", total_steps=100, power=1.0) == [2.0, 1.0, 0.0, 0.0]
    assert rates([50], lr=1.0, schedule="polynomial", total_steps=100) == [0.5**0.9]
    got = rates([4, 5, 9], lr=1.0, schedule="polynomial", total_steps=10, warmup_steps=4, power=2.0)
    assert got == pytest.approx([1.0, (5 / 6) ** 2, (1 / 6) ** 2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "lbfgs"}, "'lbfgs': use one of sgd, adam, adamw .*element-wise"),
        ({"name": "lamb"}, "element-wise"),
        ({"name": "SGD"}, "'SGD'"),
        ({"schedule": "linear"}, "'linear': use one of constant, step, cosine, polynomial"),
        ({"on_nan": "ignore"}, "'ignore': use one of stop, skip"),
        ({"lr": -0.1}, "lr is -0.1"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": math.inf}, "lr is inf"),
        ({"momentum": -1.0}, "momentum is -1"),
        ({"weight_decay": -1e-4}, "weight_decay is -0.0001"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"decay_steps": -5}, "decay_steps is -5"),
        ({"nesterov": True}, "nesterov needs a momentum"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm is 0.0"),
        ({"clip_grad_norm": -1.0}, "clip_grad_norm is -1.0"),
        ({"clip_grad_norm": math.nan}, "clip_grad_norm is nan"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**arguments)


def test_patterns_choose_factors_and_frozen_keys() -> None:
    config = OptimizerConfig(lr_factors=(("head.*", 10.0), ("*.bias", 2.0)), frozen=("backbone.layer1.*",))
    assert config.lr_factor("head.bias") == 10.0, "the first match counts"
    assert config.lr_factor("neck.bias") == 2.0
    assert config.lr_factor("neck.weight") == 1.0
    assert config.is_frozen("backbone.layer1.conv.weight")
    assert not config.is_frozen("backbone.layer2.conv.weight")
    config.check_patterns(["head.weight", "neck.bias", "backbone.layer1.weight"])


@pytest.mark.parametrize("arguments", [{"lr_factors": (("haed.*", 10.0),)}, {"frozen": ("haed.*",)}])
def test_a_pattern_that_fits_no_key_is_a_typing_error(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"'haed\.\*' fits none of the model's 2 parameters, e\.g\. 'head\.weight'"):
        OptimizerConfig(**arguments).check_patterns(["head.weight", "head.bias"])


def test_a_vote_is_needed_exactly_where_a_step_may_be_scaled_or_dropped() -> None:
    assert not OptimizerConfig().needs_vote
    assert OptimizerConfig(on_nan="skip").needs_vote
    assert OptimizerConfig(clip_grad_norm=1.0).needs_vote
