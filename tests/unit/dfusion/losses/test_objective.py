import math

import pytest
import torch

from dfusion.config import TrainingConfig
from dfusion.losses.objective import RowLosses, RowTerms, row_losses


def found(algorithm: str, sides: int, **settings: float) -> RowLosses:
    """One row whose first transition has log-ratio 0.1, the second -0.1; KL 0.5, advantage 2."""
    log_ratios = torch.tensor([[0.1, -0.1]])[:, :sides]
    terms = RowTerms(log_ratios, torch.zeros(1, sides), torch.tensor([0.5]), torch.tensor([2.0]))
    return row_losses(terms, TrainingConfig(algorithm=algorithm, **settings))


def test_dpo_takes_both_transitions() -> None:
    losses = found("dpo", 2, beta=3.0)
    assert losses.losses.item() == pytest.approx(math.log1p(math.exp(-0.6)))
    assert losses.margins is not None and losses.margins.tolist() == [pytest.approx(0.6)] and losses.clipped is None


def test_ddpo_takes_the_advantage() -> None:
    losses = found("ddpo", 1, clip_range=0.2)
    assert losses.losses.item() == pytest.approx(-2 * math.exp(0.1))
    assert losses.margins is None and losses.clipped is not None and losses.clipped.tolist() == [False]
    assert found("ddpo", 1).clipped.tolist() == [True]  # the published clip range is 1e-4


def test_dpok_takes_the_divergence_too() -> None:
    losses = found("dpok", 1, clip_range=0.2, policy_weight=7.0, kl_weight=0.3)
    assert losses.losses.item() == pytest.approx(7 * -2 * math.exp(0.1) + 0.3 * 0.5)
    assert losses.clipped is not None and losses.clipped.tolist() == [False]
