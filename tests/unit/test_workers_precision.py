"""The loss scale of fp16 changes no gradient that needs none, and goes down until all are finite."""

from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from models.task import LossSum
from workers.precision import autocast, backward_scaled


def _none() -> AbstractContextManager[None]:
    return nullcontext()


def _loss(model: nn.Module, weight: float = 4.0) -> LossSum:
    return LossSum(model(torch.linspace(-1, 1, 8).view(1, 8)).square().sum(), torch.tensor(weight).double())


def _gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(8, 4)


def test_a_power_of_two_leaves_the_gradients_of_fp32_as_they_are() -> None:
    plain, scaled = _model(), _model()
    _loss(plain).total.backward()  # type: ignore[no-untyped-call]
    backward_scaled(_loss(scaled), list(scaled.parameters()), _none)
    assert all(torch.equal(a, b) for a, b in zip(_gradients(plain), _gradients(scaled), strict=True))


def test_gradients_that_would_vanish_in_fp16_are_kept() -> None:
    plain, scaled = _model(), _model()
    for model in (plain, scaled):
        with autocast("cpu", "fp16"):
            total = (model(torch.full((1, 8), 1e-3)) * 1e-6).float().sum()
        if model is plain:
            total.backward()
        else:
            backward_scaled(LossSum(total, torch.tensor(1.0)), list(model.parameters()), _none)
    assert not any(gradient.any() for gradient in _gradients(plain)[:1])
    wanted = torch.full((4, 8), 1e-9)
    torch.testing.assert_close(_gradients(scaled)[0], wanted, rtol=0.05, atol=0.0)


class _Steep(torch.autograd.Function):
    """Overflows where what comes in is larger than 2^12, and draws a random number at each attempt."""

    attempts: ClassVar[list[float]] = []

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        _Steep.attempts.append(float(torch.rand(())))
        return torch.where(gradient.abs() > 2**12, float("inf"), gradient)


def test_a_scale_that_overflows_is_lowered_and_every_attempt_draws_the_same() -> None:
    _Steep.attempts.clear()
    parameter, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(1))
    seen: list[Tensor] = []
    parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))  # type: ignore[no-untyped-call]

    def seeded() -> AbstractContextManager[None]:
        torch.manual_seed(5)
        return nullcontext()

    loss = LossSum(_Steep.apply(parameter).sum(), torch.tensor(1.0))  # type: ignore[no-untyped-call]
    backward_scaled(loss, [parameter, unused], seeded)
    assert len(_Steep.attempts) == 2
    assert len(set(_Steep.attempts)) == 1
    assert [gradient.tolist() for gradient in seen] == [[1.0, 1.0, 1.0]]
    assert unused.grad is None


def test_a_gradient_that_is_infinite_without_a_scale_stays_so() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    backward_scaled(LossSum(parameter.sqrt().sum(), torch.tensor(100.0)), [parameter], _none)
    assert parameter.grad is not None
    assert parameter.grad.isinf().all()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_computes_in_sixteen_bits(precision: str) -> None:
    with autocast("cpu", precision):  # type: ignore[arg-type]
        found = torch.ones(2, 2) @ torch.ones(2, 2)
    assert found.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
