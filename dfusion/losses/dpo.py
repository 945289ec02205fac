"""Eq. 6: direct preference optimisation over the transitions of two trajectories."""

from __future__ import annotations

import torch
from torch.nn import functional


def dpo_margin(
    logp_w: torch.Tensor, ref_logp_w: torch.Tensor, logp_l: torch.Tensor, ref_logp_l: torch.Tensor, beta: float
) -> torch.Tensor:
    """beta * (log-ratio of the preferred transition - log-ratio of the rejected one), of any one shape."""
    return beta * ((logp_w - ref_logp_w) - (logp_l - ref_logp_l))


def dpo_loss(
    logp_w: torch.Tensor, ref_logp_w: torch.Tensor, logp_l: torch.Tensor, ref_logp_l: torch.Tensor, beta: float
) -> torch.Tensor:
    """Eq. 6 for each row, (B,) from four (B,) tensors of log-probs (means over C*h*w): -log sigmoid(margin).

    ln 2 where the policy is the one that log pref was computed with.
    """
    return -functional.logsigmoid(dpo_margin(logp_w, ref_logp_w, logp_l, ref_logp_l, beta))
