"""Eq. 8: DDPO, the policy gradient over single trajectories with PPO's clip."""

from __future__ import annotations

import torch

from dfusion.config import TrainingConfig
from dfusion.losses.objective import RowLosses, RowTerms


def row_losses(terms: RowTerms, config: TrainingConfig) -> RowLosses:
    """Eq. 8 for each row of samples."""
    policy = terms.log_probs[:, 0], terms.old[:, 0], terms.advantages
    clipped = is_clipped(*policy, config.clip_range).detach()
    return RowLosses(ddpo_loss(*policy, config.clip_range), clipped=clipped)


def ddpo_loss(logp: torch.Tensor, old_logp: torch.Tensor, advantages: torch.Tensor, clip_range: float) -> torch.Tensor:
    """Eq. 8 for each row: -min(A * ratio, A * clip(ratio, 1 - epsilon, 1 + epsilon)) with ratio = p / p_old.

    (B,) from three (B,) tensors; log-probs are means over C*h*w, A is the advantage, `clip_range` epsilon. -A where
    the policy is the one that log p_old was computed with.
    """
    unclipped, clipped = _terms(logp, old_logp, advantages, clip_range)
    return -torch.minimum(unclipped, clipped)


def is_clipped(logp: torch.Tensor, old_logp: torch.Tensor, advantages: torch.Tensor, clip_range: float) -> torch.Tensor:
    """(B,) bool: the rows whose gradient the clip takes away, because the ratio has left 1 +- epsilon in the direction
    that the advantage asks for. Arguments as of `ddpo_loss`."""
    unclipped, clipped = _terms(logp, old_logp, advantages, clip_range)
    return clipped < unclipped


def _terms(
    logp: torch.Tensor, old_logp: torch.Tensor, advantages: torch.Tensor, clip_range: float
) -> tuple[torch.Tensor, torch.Tensor]:
    ratio = (logp - old_logp).exp()
    return advantages * ratio, advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
