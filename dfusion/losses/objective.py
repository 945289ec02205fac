"""The interface of an algorithm's loss: its input, its output, and its lookup by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name

import torch

from dfusion.algorithms import ALGORITHMS
from dfusion.config import TrainingConfig


@dataclass(frozen=True)
class RowTerms:
    """R rows evaluated under the policy. S is 2 for pairs (preferred, rejected) and 1 for samples.

    log_probs   (R, S) log p of each transition, with gradients
    old         (R, S) log p of the policy before the update
    kl          (R,) KL from the reference policy, mean over the S transitions, with gradients
    advantages  (R,); not used for pairs
    residuals   (R, S, C, h, w) mu - x_prev, each element weighted as in log p; used for pairs with a safeguard
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
    margins  (R,) of dpo, before the clip; None for other algorithms
    clipped  (R,) bool: rows in which the clip removes a gradient; None without a clip
    """

    losses: torch.Tensor
    margins: torch.Tensor | None = None
    clipped: torch.Tensor | None = None


def row_losses(terms: RowTerms, config: TrainingConfig) -> RowLosses:
    """The loss of each row under `config.algorithm`: Eq. 6, 8 or 9."""
    losses: Callable[[RowTerms, TrainingConfig], RowLosses] = resolve_name(ALGORITHMS[config.algorithm].losses)
    return losses(terms, config)
