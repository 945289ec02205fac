"""The loss of a training's rows under the algorithm that it is set to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dfusion.config import TrainingConfig
from dfusion.losses.ddpo import ddpo_loss, is_clipped
from dfusion.losses.dpo import dpo_loss, dpo_margin, safeguard_scale
from dfusion.losses.dpok import dpok_loss


@dataclass(frozen=True)
class RowTerms:
    """What R rows are worth under the policy; S is 2 for pairs (preferred, rejected) and 1 for samples.

    log_probs   (R, S) log p of each transition, with gradients
    old         (R, S) log p of the policy before the update
    kl          (R,) KL from the reference policy, mean over the S transitions, with gradients
    advantages  (R,); not read for pairs
    residuals   (R, S, C, h, w) mu - x_prev, each element weighted as it is in log p; read for pairs with a safeguard
    """

    log_probs: torch.Tensor
    old: torch.Tensor
    kl: torch.Tensor
    advantages: torch.Tensor
    residuals: torch.Tensor


@dataclass(frozen=True)
class RowLosses:
    """Losses of R rows.

    losses   (R,) with gradients
    margins  (R,) of dpo, before the clip; else None
    clipped  (R,) bool: rows in which the clip takes a gradient away; None where there is no clip
    """

    losses: torch.Tensor
    margins: torch.Tensor | None = None
    clipped: torch.Tensor | None = None


def row_losses(terms: RowTerms, config: TrainingConfig) -> RowLosses:
    """Eq. 6, 8 or 9 for each row, by `config.algorithm`."""
    if config.algorithm == "dpo":
        return _dpo(terms, config)
    policy = terms.log_probs[:, 0], terms.old[:, 0], terms.advantages
    clipped = is_clipped(*policy, config.clip_range).detach()
    if config.algorithm == "ddpo":
        return RowLosses(ddpo_loss(*policy, config.clip_range), clipped=clipped)
    weights = config.policy_weight, config.kl_weight
    return RowLosses(dpok_loss(*policy, terms.kl, config.clip_range, *weights), clipped=clipped)


def _dpo(terms: RowTerms, config: TrainingConfig) -> RowLosses:
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
