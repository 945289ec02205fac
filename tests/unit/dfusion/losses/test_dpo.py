import math

import numpy as np
import pytest
import torch

from dfusion.losses.dpo import dpo_loss, dpo_margin, safeguard_scale


def test_by_hand() -> None:
    """margin = 0.5 * ((-1 + 2) - (-3 + 2.4)) = 0.8; loss = log(1 + e^-0.8)."""
    terms = [torch.tensor([value]) for value in (-1.0, -2.0, -3.0, -2.4)]
    assert dpo_loss(*terms, beta=0.5).item() == pytest.approx(math.log1p(math.exp(-0.8)), rel=1e-6)


def test_ln_2_at_the_reference_policy() -> None:
    x, y = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    assert dpo_loss(x, x, y, y, beta=100.0).tolist() == [pytest.approx(math.log(2), rel=1e-6)] * 5


def test_the_gradient_raises_the_preferred_and_lowers_the_rejected() -> None:
    w = torch.zeros(1, requires_grad=True)
    loser = torch.zeros(1, requires_grad=True)
    dpo_loss(w, torch.zeros(1), loser, torch.zeros(1), beta=0.1).sum().backward()
    assert (w.grad.item(), loser.grad.item()) == (pytest.approx(-0.05), pytest.approx(0.05))  # beta * sigmoid(0)


def test_each_sides_ratio_is_clipped_by_itself() -> None:
    """Ratios 1.2 and 0.95 with a clip of 0.1: the first is clamped to 1.1 without gradient, the second is inside."""
    w = torch.tensor([math.log(1.2)], requires_grad=True)
    loser = torch.tensor([math.log(0.95)], requires_grad=True)
    zero = torch.zeros(1)
    margin = dpo_margin(w, zero, loser, zero, beta=2.0, ratio_clip=0.1)

    assert margin.item() == pytest.approx(2 * (math.log(1.1) - math.log(0.95)), rel=1e-6)

    loss = dpo_loss(w, zero, loser, zero, beta=2.0, ratio_clip=0.1)
    assert loss.item() == pytest.approx(math.log(1 + (0.95 / 1.1) ** 2), rel=1e-6)

    loss.sum().backward()
    odds = (0.95 / 1.1) ** 2

    assert w.grad.item() == 0 and loser.grad.item() == pytest.approx(2 * odds / (1 + odds), rel=1e-5)


def test_the_safeguards_scale_by_hand() -> None:
    """Residuals over 1 x 1 x 2 elements. |w|^2 = 5; w . l = 10, 2.5, -5 and 0: with mu = 0.2 the bound is 4 over the
    product, 0.4, 1.6 (at most 1), and 1 if the two gradients do not point the same way."""
    w = torch.tensor([[1.0, 2.0]] * 4).reshape(4, 1, 1, 2)
    loser = torch.tensor([[2.0, 4.0], [0.5, 1.0], [-1.0, -2.0], [2.0, -1.0]]).reshape(4, 1, 1, 2)
    assert safeguard_scale(w, loser, mu=0.2).tolist() == pytest.approx([0.4, 1.0, 1.0, 1.0])
    assert safeguard_scale(w, loser, mu=1.0).tolist() == pytest.approx([0.0, 0.0, 1.0, 1.0])


def test_no_overflow_far_from_the_reference() -> None:
    far = torch.tensor([-1e6])
    assert dpo_loss(far, torch.zeros(1), torch.zeros(1), torch.zeros(1), beta=1.0).item() == pytest.approx(1e6)


def test_agrees_with_numpy_and_finite_differences() -> None:
    rng = np.random.default_rng(0)
    terms = rng.normal(0, 1, (4, 50))
    beta = 1.7
    width = 1e-6

    def loss_of(w: np.ndarray, ref_w: np.ndarray, loser: np.ndarray, ref_loser: np.ndarray) -> np.ndarray:
        odds = (np.exp(w) / np.exp(ref_w) / (np.exp(loser) / np.exp(ref_loser))) ** beta
        return -np.log(odds / (1 + odds))

    w, loser = (torch.tensor(terms[i], requires_grad=True) for i in (0, 2))
    loss = dpo_loss(w, torch.tensor(terms[1]), loser, torch.tensor(terms[3]), beta)
    loss.sum().backward()
    np.testing.assert_allclose(loss.detach().numpy(), loss_of(*terms), rtol=1e-9)
    for row, gradient in ((0, w.grad), (2, loser.grad)):
        shift = np.zeros_like(terms)
        shift[row] = width
        slope = (loss_of(*(terms + shift)) - loss_of(*(terms - shift))) / (2 * width)
        np.testing.assert_allclose(gradient.numpy(), slope, atol=1e-8)
