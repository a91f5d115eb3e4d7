"""The summed cross-entropy: any split gives the same sum, and void pixels do not count."""

import pytest
import torch
import torch.nn.functional as F

from models.data.voc_classes import VOID
from models.fcn.loss import segmentation_loss


def _batch(*, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits_NKHW = torch.randn(5, 7, 20, 30, generator=generator)
    mask_NHW = torch.randint(0, 7, (5, 20, 30), generator=generator, dtype=torch.uint8)
    mask_NHW[torch.rand(5, 20, 30, generator=generator) < 0.3] = VOID
    mask_NHW[2] = VOID
    return logits_NKHW.to(device), mask_NHW.to(device)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_is_the_sum_of_the_labelled_pixels_cross_entropies(layout: torch.memory_format) -> None:
    logits, mask = _batch()
    loss = segmentation_loss(logits.contiguous(memory_format=layout), mask)
    torch.testing.assert_close(loss.total, F.cross_entropy(logits, mask.long(), ignore_index=VOID, reduction="sum"))
    assert loss.weight.dtype == torch.float64
    assert loss.weight == (mask != VOID).sum()


@pytest.mark.parametrize("cuts", [(2, 3), (1, 1, 1, 1, 1), (4, 1)])
def test_any_split_gives_the_same_sum_and_exactly_the_same_weight(cuts: tuple[int, ...]) -> None:
    logits, mask = _batch()
    whole = segmentation_loss(logits, mask)
    parts = [segmentation_loss(*part) for part in zip(logits.split(cuts), mask.split(cuts), strict=True)]
    torch.testing.assert_close(sum(part.total for part in parts), whole.total, rtol=1e-6, atol=0)
    assert sum(part.weight for part in parts) == whole.weight


def test_without_labelled_pixels_the_gradient_is_zero_and_finite() -> None:
    logits = _batch()[0].requires_grad_()
    loss = segmentation_loss(logits, torch.full((5, 20, 30), VOID, dtype=torch.uint8))
    loss.total.backward()
    assert (loss.total, loss.weight) == (0, 0)
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.gpu
def test_it_has_a_deterministic_kernel_on_cuda() -> None:
    logits, mask = _batch(device="cuda")
    logits.requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        segmentation_loss(logits, mask).total.backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert logits.grad.isfinite().all()
