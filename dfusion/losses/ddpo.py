"""Eq. 8: DDPO, a policy gradient over single trajectories with PPO's clipped ratio.

Source: Black et al., "Training Diffusion Models with Reinforcement Learning", arXiv 2305.13301.
"""

from __future__ import annotations

import torch

from dfusion.config import TrainingConfig
from dfusion.losses.objective import RowLosses, RowTerms


def row_losses(terms: RowTerms, config: TrainingConfig) -> RowLosses:
    """Eq. 8 for each row of samples."""
    policy = (terms.log_probs[:, 0], terms.old[:, 0], terms.advantages)
    losses = ddpo_loss(*policy, config.clip_range)
    clipped = is_clipped(*policy, config.clip_range).detach()
    return RowLosses(losses, clipped=clipped)


def ddpo_loss(logp: torch.Tensor, old_logp: torch.Tensor, advantages: torch.Tensor, clip_range: float) -> torch.Tensor:
    """Eq. 8 for each row: -min(A * ratio, A * clip(ratio, 1 - epsilon, 1 + epsilon)) with ratio = p / p_old.

    The loss makes transitions with a positive advantage more likely, and those with a negative one less likely. The
    clip ends the gradient of a row when its ratio has left 1 +- epsilon.

    Args:
        logp: (B,) log p of each transition, mean over C*h*w, with gradients.
        old_logp: (B,) log p_old, the same under the policy before the update.
        advantages: (B,) A, the normalised rewards.
        clip_range: epsilon.

    Returns:
        (B,) losses. A loss is -A while p equals p_old.
    """
    # Notation (<variable> -> <paper>): logp -> log p_theta, old_logp -> log p_old, advantages -> A,
    #   clip_range -> epsilon
    unclipped, clipped = _terms(logp, old_logp, advantages, clip_range)
    return -torch.minimum(unclipped, clipped)


def is_clipped(logp: torch.Tensor, old_logp: torch.Tensor, advantages: torch.Tensor, clip_range: float) -> torch.Tensor:
    """(B,) bool: the rows without a gradient, because the ratio has left 1 +- epsilon in the advantage's direction.

    The arguments are those of `ddpo_loss`.
    """
    unclipped, clipped = _terms(logp, old_logp, advantages, clip_range)
    return clipped < unclipped


def _terms(
    logp: torch.Tensor, old_logp: torch.Tensor, advantages: torch.Tensor, clip_range: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A * ratio and A * clip(ratio), (B,) each."""
    ratio = (logp - old_logp).exp()
    return advantages * ratio, advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
