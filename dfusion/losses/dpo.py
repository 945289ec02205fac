"""Eq. 6: direct preference optimisation over the transitions of two trajectories.

Sources: Rafailov et al., "Direct Preference Optimization", arXiv 2305.18290; Yang et al., "Using Human Feedback to
Fine-tune Diffusion Models without Any Reward Model" (D3PO), arXiv 2311.13231.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from dfusion.config import TrainingConfig
from dfusion.losses.objective import RowLosses, RowTerms


def row_losses(terms: RowTerms, config: TrainingConfig) -> RowLosses:
    """Eq. 6 for each row of pairs, with the safeguard if it is configured."""
    preferred, rejected = terms.log_probs.unbind(1)
    old_preferred, old_rejected = terms.old.unbind(1)

    # 1. safeguard: keep the value, scale the rejected side's gradient
    if config.safeguard is not None:
        scale = safeguard_scale(terms.residuals[:, 0], terms.residuals[:, 1], config.safeguard)
        rejected = scale * rejected + (1 - scale) * rejected.detach()

    # 2. losses, and margins without the clip
    sides = (preferred, old_preferred, rejected, old_rejected, config.beta)
    losses = dpo_loss(*sides, config.ratio_clip)
    margins = dpo_margin(*sides).detach()
    if config.ratio_clip is None:
        return RowLosses(losses, margins)

    # 3. rows in which the clip has removed a gradient
    ratios = (terms.log_probs - terms.old).detach().exp()
    clipped = ((ratios - 1).abs() > config.ratio_clip).any(1)
    return RowLosses(losses, margins, clipped)


def dpo_margin(
    logp_w: torch.Tensor,
    ref_logp_w: torch.Tensor,
    logp_l: torch.Tensor,
    ref_logp_l: torch.Tensor,
    beta: float,
    ratio_clip: float | None = None,
) -> torch.Tensor:
    """beta * (log-ratio of the preferred transition - log-ratio of the rejected one), elementwise.

    Args:
        logp_w: log p of the preferred transition (w), mean over C*h*w.
        ref_logp_w: log pref of it, the same under the policy before the update.
        logp_l: log p of the rejected transition (l), mean over C*h*w.
        ref_logp_l: log pref of it.
        beta: beta of Eq. 6.
        ratio_clip: Clamp the ratio p / pref of each side to 1 +- this, as D3PO does. A side beyond it adds no gradient.
            None: no clamp.

    Returns:
        The margins, of the shape that the four tensors share.
    """
    log_ratio_w = logp_w - ref_logp_w
    log_ratio_l = logp_l - ref_logp_l
    if ratio_clip is not None:
        lowest = math.log(1 - ratio_clip)
        highest = math.log(1 + ratio_clip)
        log_ratio_w = log_ratio_w.clamp(lowest, highest)
        log_ratio_l = log_ratio_l.clamp(lowest, highest)
    return beta * (log_ratio_w - log_ratio_l)


def dpo_loss(
    logp_w: torch.Tensor,
    ref_logp_w: torch.Tensor,
    logp_l: torch.Tensor,
    ref_logp_l: torch.Tensor,
    beta: float,
    ratio_clip: float | None = None,
) -> torch.Tensor:
    """Eq. 6 for each row: -log sigmoid(margin).

    The loss makes the preferred transition more likely and the rejected one less likely. Its gradient vanishes as the
    margin grows.

    Args:
        logp_w: (B,) log p of the preferred transition, as for `dpo_margin`.
        ref_logp_w: (B,) log pref of it.
        logp_l: (B,) log p of the rejected transition.
        ref_logp_l: (B,) log pref of it.
        beta: beta of Eq. 6.
        ratio_clip: As for `dpo_margin`.

    Returns:
        (B,) losses. A loss is ln 2 while p equals pref.
    """
    # Notation (<variable> -> <paper>): logp_w -> log p_theta(x^w), ref_logp_w -> log pref(x^w), and l for the rejected
    margin = dpo_margin(logp_w, ref_logp_w, logp_l, ref_logp_l, beta, ratio_clip)
    return -functional.logsigmoid(margin)


def safeguard_scale(residual_w: torch.Tensor, residual_l: torch.Tensor, mu: float) -> torch.Tensor:
    """The factor lambda of the rejected side's gradient in Diffusion-SDPO.

    Consider a step along g_w - lambda * g_l, the gradients of the preferred and the rejected side with respect to the
    network's output. To first order, it does not make the preferred side less likely while
    lambda <= (1 - mu) |g_w|^2 / (g_w . g_l). Both transitions of a row belong to one step. Therefore their gradients of
    -log p are the residuals mu_theta - x_prev times a common factor, which cancels.

    Source: Diffusion-SDPO, arXiv 2511.03317. Its released code uses one factor per batch. Here each row has its own
    factor, so that the result does not depend on the micro-batch.

    Args:
        residual_w: (B, C, h, w) mu_theta - x_prev of the preferred transition. Where log p is a weighted mean, each
            element is multiplied by its weight.
        residual_l: The same of the rejected transition.
        mu: 0 keeps the preferred side's log-prob from falling. 1 removes the rejected side's gradient in every row
            where the two gradients point the same way.

    Returns:
        (B,) in [0, 1], without gradients.
    """
    # Notation (<variable> -> <paper>): squared -> |g_w|^2, common -> g_w . g_l, bound -> lambda
    squared = residual_w.square().flatten(1).sum(1)
    common = (residual_w * residual_l).flatten(1).sum(1)
    bound = (1 - mu) * squared / common.clamp(min=torch.finfo(common.dtype).tiny)
    return torch.where(common > 0, bound.clamp(max=1), torch.ones_like(bound)).detach()
