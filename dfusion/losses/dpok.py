"""Eq. 9: DPOK, DDPO's clipped policy term and the KL divergence from a reference policy."""

from __future__ import annotations

import torch

from dfusion.config import TrainingConfig
from dfusion.errors import ScheduleError, ShapeMismatchError
from dfusion.losses.ddpo import ddpo_loss, is_clipped
from dfusion.losses.objective import RowLosses, RowTerms


def row_losses(terms: RowTerms, config: TrainingConfig) -> RowLosses:
    """Eq. 9 for each row of samples."""
    policy = terms.log_probs[:, 0], terms.old[:, 0], terms.advantages
    clipped = is_clipped(*policy, config.clip_range).detach()
    losses = dpok_loss(*policy, terms.kl, config.clip_range, config.policy_weight, config.kl_weight)
    return RowLosses(losses, clipped=clipped)


def gaussian_kl(mean: torch.Tensor, reference_mean: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """KL(p || pref) of two steps of Eq. 1, which have the same sigma: (mu - mu_ref)^2 / (2 sigma^2), (B,).

    mean and reference_mean are (B, C, h, w) float32, sigma (B,) and positive. The mean over C*h*w, as log p is (and
    over S for (B, S, C, h, w)); never negative, and 0 only where the means are equal. Raises ShapeMismatchError, and
    ScheduleError where sigma is 0.
    """
    if mean.shape != reference_mean.shape or sigma.shape != mean.shape[:1]:
        got = (tuple(reference_mean.shape), tuple(sigma.shape))
        raise ShapeMismatchError("reference_mean and sigma", (tuple(mean.shape), tuple(mean.shape[:1])), got)
    if bool((sigma <= 0).any()):
        raise ScheduleError("sigma: expected a positive standard deviation, got 0; the divergence is infinite there")
    return ((mean - reference_mean).square().flatten(1).mean(1)) / (2 * sigma.square())


def dpok_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    kl: torch.Tensor,
    clip_range: float,
    policy_weight: float,
    kl_weight: float,
) -> torch.Tensor:
    """Eq. 9 for each row, (B,): alpha * (Eq. 8) + beta * KL(p || pref).

    `kl` (B,) is `gaussian_kl`, `policy_weight` alpha and `kl_weight` beta; the others are those of `ddpo_loss`. DPOK's
    value function is replaced by the normalised reward (appendix C.1).
    """
    return policy_weight * ddpo_loss(logp, old_logp, advantages, clip_range) + kl_weight * kl
