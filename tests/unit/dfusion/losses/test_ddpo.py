import math

import numpy as np
import pytest
import torch

from dfusion.losses.ddpo import ddpo_loss, is_clipped


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient", "clipped"),
    [
        # -min(A r, A clip(r, 0.8, 1.2)); its slope against log p is -A r, and 0 where the clip is active
        (2.0, 1.0, -2.0, -2.0, False),
        (2.0, 1.1, -2.2, -2.2, False),
        (2.0, 1.5, -2.4, 0.0, True),  # raised enough
        (2.0, 0.5, -1.0, -1.0, False),  # lowered against the advantage: the way back stays open
        (-2.0, 0.5, 1.6, 0.0, True),  # lowered enough
        (-2.0, 1.5, 3.0, 3.0, False),  # raised against the advantage
        (0.0, 1.5, 0.0, 0.0, False),
    ],
)
def test_by_hand(advantage: float, ratio: float, loss: float, gradient: float, clipped: bool) -> None:
    old = torch.tensor([-3.0])
    new = (old + math.log(ratio)).requires_grad_()
    terms = new, old, torch.tensor([advantage]), 0.2
    actual = ddpo_loss(*terms)
    actual.sum().backward()
    assert actual.item() == pytest.approx(loss, rel=1e-6)
    assert new.grad.item() == pytest.approx(gradient, rel=1e-6)
    assert is_clipped(*terms).tolist() == [clipped]


def test_at_the_old_policy_the_gradient_is_the_policy_gradient() -> None:
    """-A for every row: log p of good samples increases, that of bad ones decreases."""
    logp = torch.linspace(-3, 3, 5, requires_grad=True)
    advantages = torch.tensor([-5.0, -0.1, 0.0, 0.1, 5.0])
    loss = ddpo_loss(logp, logp.detach(), advantages, 1e-4)
    loss.sum().backward()
    torch.testing.assert_close(logp.grad, -advantages)
    torch.testing.assert_close(loss.detach(), -advantages)


def _numpy_loss(new: np.ndarray, old: np.ndarray, advantages: np.ndarray, clip_range: float) -> np.ndarray:
    """PPO's objective case by case, as Schulman et al. describe it in words."""
    ratio = np.exp(new - old)
    good = np.where(ratio > 1 + clip_range, (1 + clip_range) * advantages, ratio * advantages)
    bad = np.where(ratio < 1 - clip_range, (1 - clip_range) * advantages, ratio * advantages)
    return -np.where(advantages >= 0, good, bad)


def test_agrees_with_numpy_and_finite_differences() -> None:
    rng = np.random.default_rng(0)
    new, old, advantages = rng.normal(0, 0.3, (3, 200))
    clip_range = 0.1
    width = 1e-6
    parameter = torch.tensor(new, requires_grad=True)
    loss = ddpo_loss(parameter, torch.tensor(old), torch.tensor(advantages), clip_range)
    loss.sum().backward()

    np.testing.assert_allclose(loss.detach().numpy(), _numpy_loss(new, old, advantages, clip_range), rtol=1e-12)

    ahead, behind = (_numpy_loss(new + d, old, advantages, clip_range) for d in (width, -width))
    away = np.abs(np.abs(np.exp(new - old) - 1) - clip_range) > 1e-4  # there is no slope at the clip's corners

    np.testing.assert_allclose(parameter.grad.numpy()[away], ((ahead - behind) / (2 * width))[away], atol=1e-8)
    assert 0 < is_clipped(parameter, torch.tensor(old), torch.tensor(advantages), clip_range).sum() < 200
