"""The loss of a training's rows under the algorithm that it is set to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dfusion.config import TrainingConfig
from dfusion.losses.ddpo import ddpo_loss, is_clipped
from dfusion.losses.dpo import dpo_loss, dpo_margin
from dfusion.losses.dpok import dpok_loss


@dataclass(frozen=True)
class RowTerms:
    """What R rows are worth under the policy; S is 2 for pairs (preferred, rejected) and 1 for samples.

    log_probs   (R, S) log p of each transition, with gradients
    old         (R, S) log p of the policy before the update
    kl          (R,) KL from the reference policy, mean over the S transitions, with gradients
    advantages  (R,); not read for pairs
    """

    log_probs: torch.Tensor
    old: torch.Tensor
    kl: torch.Tensor
    advantages: torch.Tensor


@dataclass(frozen=True)
class RowLosses:
    """losses (R,) with gradients; margins (R,) of dpo, or None; clipped (R,) bool of ddpo and dpok, or None."""

    losses: torch.Tensor
    margins: torch.Tensor | None = None
    clipped: torch.Tensor | None = None


def row_losses(terms: RowTerms, config: TrainingConfig) -> RowLosses:
    """Eq. 6, 8 or 9 for each row, by `config.algorithm`."""
    new, old = terms.log_probs, terms.old
    if config.algorithm == "dpo":
        sides = new[:, 0], old[:, 0], new[:, 1], old[:, 1], config.beta
        return RowLosses(dpo_loss(*sides), margins=dpo_margin(*sides).detach())
    policy = new[:, 0], old[:, 0], terms.advantages
    clipped = is_clipped(*policy, config.clip_range).detach()
    if config.algorithm == "ddpo":
        return RowLosses(ddpo_loss(*policy, config.clip_range), clipped=clipped)
    weights = config.policy_weight, config.kl_weight
    return RowLosses(dpok_loss(*policy, terms.kl, config.clip_range, *weights), clipped=clipped)
