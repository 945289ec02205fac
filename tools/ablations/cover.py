"""Targets under masks that cover ever more of the image: how much of its base a target then keeps (decision 003)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dfusion.config import FusionConfig, PairingConfig
from dfusion.figures import fusion_mask
from dfusion.fused_sampling import fuse
from dfusion.pairing import adopt
from dfusion.types import Trajectory
from tools.ablations.pairs import Bench, Pairs, conditions

COVERS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Covered:
    """A target under a mask that was widened to a share of the image: its distances to base and reference as shares of
    the distance between these two (root mean square of clean latents), and what it scores."""

    picture: np.ndarray
    cover: float
    adopted: bool
    accepted: bool | None
    margin: float
    to_base: float
    to_reference: float


def widened(reference: Trajectory, thresholds: Sequence[float], share: float, config: FusionConfig) -> list[float]:
    """`thresholds` times the largest common factor with which the mask of `reference` (one sample) covers `share` of
    the image, found by bisection. Items must be merged by "or": with "xor" their masks cancel as they widen."""
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
    """The targets of one pair under masks that cover each of COVERS."""
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
    pictures = bench.model.decode(target.final)
    scores = bench.scores(pictures, pair.prompt)
    accepted = bench.accepts(pictures, pair.prompt)

    base, reference = pair.base.final[0], pair.reference.final[0]
    apart = float((reference - base).norm())
    return [
        Covered(
            picture=pictures[row],
            cover=float(fusion_mask(pair.reference, thresholds[row], config).mean()),
            adopted=adopt(scores[row], pair.base_scores[0], pair.reference_scores[0], PairingConfig()),
            accepted=accepted[row],
            margin=scores[row] - pair.base_scores[0],
            to_base=float((latents - base).norm()) / apart,
            to_reference=float((latents - reference).norm()) / apart,
        )
        for row, latents in enumerate(target.final)
    ]
