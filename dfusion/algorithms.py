"""The training algorithms, each described in one place. Does not import torch.

The descriptions determine which settings are valid, which examples are used, how gradients are scaled and how jobs are
planned. No other code depends on an algorithm's name. docs/how-to/add-an-algorithm.md shows how to add one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Algorithm:
    """One algorithm.

    name         the value of `TrainingConfig.algorithm`
    learns_from  "pairs", a better and a worse trajectory of one prompt (`TrainingPair`), or "samples", a trajectory
                 with its advantage (`TrainingSample`)
    losses       "module:function" of its loss, (RowTerms, TrainingConfig) -> RowLosses (`dfusion.losses.objective`);
                 imported on first use, since it needs torch
    settings     the fields of `TrainingConfig` that only some algorithms read, this one included; a training by another
                 algorithm must leave them at their defaults
    weight       the setting to which the loss's gradient is proportional; None if there is none
    has_kl       whether the loss has the KL from a reference policy, whose means are then evaluated for every row
    """

    name: str
    learns_from: Literal["pairs", "samples"]
    losses: str
    settings: tuple[str, ...]
    weight: str | None = None
    has_kl: bool = False


DPO = Algorithm(
    name="dpo",
    learns_from="pairs",
    losses="dfusion.losses.dpo:row_losses",
    settings=("beta", "ratio_clip", "safeguard", "credit"),
    weight="beta",
)
"""Eq. 6."""

DDPO = Algorithm(
    name="ddpo",
    learns_from="samples",
    losses="dfusion.losses.ddpo:row_losses",
    settings=("clip_range", "advantage_clip"),
)
"""Eq. 8."""

DPOK = Algorithm(
    name="dpok",
    learns_from="samples",
    losses="dfusion.losses.dpok:row_losses",
    settings=("clip_range", "advantage_clip", "policy_weight", "kl_weight", "kl_reference"),
    weight="policy_weight",
    has_kl=True,
)
"""Eq. 9."""

ALGORITHMS: dict[str, Algorithm] = {algorithm.name: algorithm for algorithm in (DPO, DDPO, DPOK)}
"""All algorithms by name."""


def readers(setting: str) -> tuple[str, ...]:
    """The names of the algorithms that read `setting`. Empty if it is not specific to some algorithms."""
    return tuple(name for name, algorithm in ALGORITHMS.items() if setting in algorithm.settings)
