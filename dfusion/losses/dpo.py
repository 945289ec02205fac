"""Eq. 6: direct preference optimisation over the transitions of two trajectories."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from dfusion.config import TrainingConfig
from dfusion.losses.objective import RowLosses, RowTerms


def row_losses(terms: RowTerms, config: TrainingConfig) -> RowLosses:
    """Eq. 6 for each row of pairs, with the safeguard if there is one."""
    preferred, rejected = terms.log_probs.unbind(1)
    old_preferred, old_rejected = terms.old.unbind(1)
    if config.safeguard is not None:
        # the same value; of the gradient only this share
        share = safeguard_scale(terms.residuals[:, 0], terms.residuals[:, 1], config.safeguard)
        rejected = share * rejected + (1 - share) * rejected.detach()

    sides = preferred, old_preferred, rejected, old_rejected, config.beta
    losses = dpo_loss(*sides, config.ratio_clip)
    margins = dpo_margin(*sides).detach()
    if config.ratio_clip is None:
        return RowLosses(losses, margins)
    ratios = (terms.log_probs - terms.old).detach().exp()
    return RowLosses(losses, margins, ((ratios - 1).abs() > config.ratio_clip).any(1))


def dpo_margin(
    logp_w: torch.Tensor,
    ref_logp_w: torch.Tensor,
    logp_l: torch.Tensor,
    ref_logp_l: torch.Tensor,
    beta: float,
    ratio_clip: float | None = None,
) -> torch.Tensor:
    """beta * (log-ratio of the preferred transition - log-ratio of the rejected one), of any one shape.

    Args:
        logp_w, logp_l: log p of the preferred (w) and of the rejected (l) transition, means over C*h*w.
        ref_logp_w, ref_logp_l: The same under the policy before the update.
        beta: beta of Eq. 6.
        ratio_clip: Clamps the ratio p / pref of each side to 1 +- this, as D3PO does: a side that has gone so far adds
            no gradient any more. None: no clamp.
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
    """Eq. 6 for each row, (B,) from four (B,) tensors: -log sigmoid(margin). Arguments as of `dpo_margin`.

    It makes the preferred transition likelier and the rejected one less likely, as far as the two do not differ yet.
    ln 2 where the policy is the one that log pref was computed with.
    """
    margin = dpo_margin(logp_w, ref_logp_w, logp_l, ref_logp_l, beta, ratio_clip)
    return -functional.logsigmoid(margin)


def safeguard_scale(residual_w: torch.Tensor, residual_l: torch.Tensor, mu: float) -> torch.Tensor:
    """The factor of the rejected side's gradient in Diffusion-SDPO, (B,) in [0, 1].

    To first order, a step along the preferred side's gradient g_w less lambda times the rejected side's g_l does not
    make the preferred side less likely while lambda <= (1 - mu) |g_w|^2 / (g_w . g_l), taken with respect to what the
    network predicts. Both transitions of a row are of one step, so that there the gradients of -log p are the residuals
    mu_theta - x_prev times one common number, which cancels.

    Args:
        residual_w, residual_l: (B, C, h, w) mu_theta - x_prev of the preferred and the rejected transition, times the
            elements' weights where log p is a weighted mean.
        mu: 0 keeps the preferred side's log-prob from falling; 1 takes the rejected side out wherever the two pull
            alike.

    Source: Diffusion-SDPO, arXiv 2511.03317, whose released code takes one factor a batch; here each row has its own,
    so that it does not depend on the micro-batch.
    """
    squared = residual_w.square().flatten(1).sum(1)
    common = (residual_w * residual_l).flatten(1).sum(1)
    bound = (1 - mu) * squared / common.clamp(min=torch.finfo(common.dtype).tiny)
    return torch.where(common > 0, bound.clamp(max=1), torch.ones_like(bound)).detach()
