import math

import pytest
import torch

from dfusion.losses.dpo import dpo_loss


def test_by_hand() -> None:
    """margin = 0.5 * ((-1 + 2) - (-3 + 2.4)) = 0.8; loss = log(1 + e^-0.8)."""
    terms = [torch.tensor([value]) for value in (-1.0, -2.0, -3.0, -2.4)]
    assert dpo_loss(*terms, beta=0.5).item() == pytest.approx(math.log1p(math.exp(-0.8)), rel=1e-6)


def test_ln_2_at_the_reference_policy() -> None:
    x, y = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    assert dpo_loss(x, x, y, y, beta=100.0).tolist() == [pytest.approx(math.log(2), rel=1e-6)] * 5


def test_the_gradient_raises_the_preferred_and_lowers_the_rejected() -> None:
    w, loser = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    dpo_loss(w, torch.zeros(1), loser, torch.zeros(1), beta=0.1).sum().backward()
    assert (w.grad.item(), loser.grad.item()) == (pytest.approx(-0.05), pytest.approx(0.05))  # beta * sigmoid(0)


def test_no_overflow_far_from_the_reference() -> None:
    far = torch.tensor([-1e6])
    assert dpo_loss(far, torch.zeros(1), torch.zeros(1), torch.zeros(1), beta=1.0).item() == pytest.approx(1e6)
