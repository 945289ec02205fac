"""Targets under masks of increasing coverage: how much of its base a target keeps (decision 003)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dfusion.config import FusionConfig, PairingConfig
from dfusion.fused_sampling import fuse
from dfusion.pair_metrics import fusion_mask
from dfusion.pairing import adopt
from dfusion.types import Trajectory
from tools.ablations.pairs import Bench, Pairs, conditions

COVERS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Covered:
    """A target under a mask that was widened to a share of the image.

    margin                 score minus the base's score
    to_base, to_reference  distances of clean latents (root mean square), as shares of the distance between these two
    """

    picture: np.ndarray
    cover: float
    adopted: bool
    accepted: bool | None
    margin: float
    to_base: float
    to_reference: float


def widened(reference: Trajectory, thresholds: Sequence[float], share: float, config: FusionConfig) -> list[float]:
    """`thresholds` times the largest common factor for which the mask of `reference` (one sample) covers `share`.

    The factor is computed by bisection. Items must be merged by "or": with "xor" their masks cancel as they widen.
    """
    low = 1e-9
    high = 0.999 / max(thresholds)
    for _ in range(40):
        factor = (low * high) ** 0.5
        cover = float(fusion_mask(reference, [limit * factor for limit in thresholds], config).mean())
        if cover >= share:
            low = factor
        else:
            high = factor
    return [limit * low for limit in thresholds]


def covered(bench: Bench, pair: Pairs, config: FusionConfig) -> list[Covered]:
    """The targets of one pair, under a mask for each share of COVERS."""
    # 1. the targets
    count = len(COVERS)
    thresholds = [widened(pair.reference, pair.thresholds, share, config) for share in COVERS]
    prompt, negative = conditions(bench.model, pair)
    target = fuse(
        bench.model.unet,
        bench.model.scheduler,
        pair.base.select([0] * count),
        pair.reference.select([0] * count),
        prompt.expand(count),
        negative,
        thresholds=thresholds,
        config=config,
    )

    # 2. their scores and distances
    pictures = bench.model.decode(target.final)
    scores = bench.scores(pictures, pair.prompt)
    accepted = bench.accepts(pictures, pair.prompt)
    base = pair.base.final[0]
    reference = pair.reference.final[0]
    distance = float((reference - base).norm())

    return [
        Covered(
            picture=pictures[row],
            cover=float(fusion_mask(pair.reference, thresholds[row], config).mean()),
            adopted=adopt(scores[row], pair.base_scores[0], pair.reference_scores[0], PairingConfig()),
            accepted=accepted[row],
            margin=scores[row] - pair.base_scores[0],
            to_base=float((latents - base).norm()) / distance,
            to_reference=float((latents - reference).norm()) / distance,
        )
        for row, latents in enumerate(target.final)
    ]
