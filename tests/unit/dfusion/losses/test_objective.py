import math

import pytest
import torch

from dfusion.config import TrainingConfig
from dfusion.losses.objective import RowLosses, RowTerms, row_losses


def losses_of(algorithm: str, sides: int, **settings: float) -> RowLosses:
    """One row whose first transition has log-ratio 0.1, the second -0.1; KL 0.5, advantage 2."""
    log_ratios = torch.tensor([[0.1, -0.1]])[:, :sides]
    residuals = torch.zeros(1, sides, 1, 1, 1)
    terms = RowTerms(log_ratios, torch.zeros(1, sides), torch.tensor([0.5]), torch.tensor([2.0]), residuals)
    return row_losses(terms, TrainingConfig(algorithm=algorithm, **settings))


def test_dpo_uses_both_transitions() -> None:
    losses = losses_of("dpo", 2, beta=3.0)
    assert losses.losses.item() == pytest.approx(math.log1p(math.exp(-0.6)))
    assert losses.margins is not None and losses.margins.tolist() == [pytest.approx(0.6)] and losses.clipped is None


def test_dpos_clip_is_in_the_loss_and_not_in_the_margin() -> None:
    """Ratios e^0.1 = 1.105 and e^-0.1 = 0.905: a clip of 0.1 stops the first only."""
    losses = losses_of("dpo", 2, beta=3.0, ratio_clip=0.1)
    assert losses.losses.item() == pytest.approx(math.log1p(math.exp(-3 * (math.log(1.1) + 0.1))))
    assert losses.margins is not None and losses.margins.tolist() == [pytest.approx(0.6)]
    assert losses.clipped is not None and losses.clipped.tolist() == [True]
    assert losses_of("dpo", 2, beta=3.0, ratio_clip=0.11).clipped.tolist() == [False]


def test_the_safeguard_scales_the_rejected_sides_gradient() -> None:
    """Residuals 1 and 4 in one element, mu 0: the scale is 1 / 4. The loss itself is unchanged."""
    log_ratios = torch.tensor([[0.1, -0.1]], requires_grad=True)
    residuals = torch.tensor([1.0, 4.0]).reshape(1, 2, 1, 1, 1)
    terms = RowTerms(log_ratios, torch.zeros(1, 2), torch.zeros(1), torch.zeros(1), residuals)
    losses = row_losses(terms, TrainingConfig(beta=3.0, safeguard=0.0)).losses
    assert losses.item() == pytest.approx(math.log1p(math.exp(-0.6)))
    losses.sum().backward()
    pull = 3 / (1 + math.exp(0.6))
    assert log_ratios.grad.tolist() == [[pytest.approx(-pull), pytest.approx(pull / 4)]]


def test_ddpo_uses_the_advantage() -> None:
    losses = losses_of("ddpo", 1, clip_range=0.2)
    assert losses.losses.item() == pytest.approx(-2 * math.exp(0.1))
    assert losses.margins is None and losses.clipped is not None and losses.clipped.tolist() == [False]
    assert losses_of("ddpo", 1).clipped.tolist() == [True]  # the published clip range is 1e-4


def test_dpok_uses_the_divergence() -> None:
    losses = losses_of("dpok", 1, clip_range=0.2, policy_weight=7.0, kl_weight=0.3)
    assert losses.losses.item() == pytest.approx(7 * -2 * math.exp(0.1) + 0.3 * 0.5)
    assert losses.clipped is not None and losses.clipped.tolist() == [False]
