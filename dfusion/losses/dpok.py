"""Eq. 9: DPOK, DDPO's clipped policy term plus the KL divergence from a reference policy.

Source: Fan et al., "DPOK: Reinforcement Learning for Fine-tuning Text-to-Image Diffusion Models", arXiv 2305.16381.
"""

from __future__ import annotations

import torch

from dfusion.config import TrainingConfig
from dfusion.errors import ScheduleError, ShapeMismatchError
from dfusion.losses.ddpo import ddpo_loss, is_clipped
from dfusion.losses.objective import RowLosses, RowTerms


def row_losses(terms: RowTerms, config: TrainingConfig) -> RowLosses:
    """Eq. 9 for each row of samples."""
    policy = (terms.log_probs[:, 0], terms.old[:, 0], terms.advantages)
    clipped = is_clipped(*policy, config.clip_range).detach()
    losses = dpok_loss(*policy, terms.kl, config.clip_range, config.policy_weight, config.kl_weight)
    return RowLosses(losses, clipped=clipped)


def gaussian_kl(mean: torch.Tensor, reference_mean: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """KL(p || pref) of two steps of Eq. 1 with the same sigma: (mu - mu_ref)^2 / (2 sigma^2).

    Args:
        mean: (B, C, h, w) or (B, S, C, h, w) float32, mu of the policy.
        reference_mean: The same shape, mu of the reference policy.
        sigma: (B,), positive.

    Returns:
        (B,), the mean over all other dimensions, as log p is. It is 0 only where the means are equal.

    Raises:
        ShapeMismatchError: Shapes that do not fit.
        ScheduleError: A sigma of 0.
    """
    if mean.shape != reference_mean.shape or sigma.shape != mean.shape[:1]:
        got = (tuple(reference_mean.shape), tuple(sigma.shape))
        raise ShapeMismatchError("reference_mean and sigma", (tuple(mean.shape), tuple(mean.shape[:1])), got)
    if bool((sigma <= 0).any()):
        raise ScheduleError("sigma: expected a positive standard deviation, got 0; the divergence is infinite there")
    return divergence(mean, reference_mean, sigma)


def divergence(mean: torch.Tensor, reference_mean: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """`gaussian_kl` without its checks. It does not wait for the device."""
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
    """Eq. 9 for each row: alpha * (Eq. 8) + beta * KL(p || pref).

    The KL term keeps the policy near the reference policy. The normalised reward replaces DPOK's value function
    (appendix C.1).

    Args:
        logp: (B,) log p of each transition, as for `ddpo_loss`.
        old_logp: (B,) log p_old.
        advantages: (B,) A.
        kl: (B,) KL(p || pref), from `gaussian_kl`.
        clip_range: epsilon of Eq. 8.
        policy_weight: alpha.
        kl_weight: beta.

    Returns:
        (B,) losses.
    """
    # Notation (<variable> -> <paper>): policy_weight -> alpha, kl_weight -> beta, the others as in `ddpo_loss`
    return policy_weight * ddpo_loss(logp, old_logp, advantages, clip_range) + kl_weight * kl
