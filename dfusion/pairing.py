"""Who becomes a reference, who a base (section "Choosing pairs"), and which targets are adopted (Eq. 7)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dfusion.config import PairingConfig
from dfusion.errors import NonFiniteError


@dataclass(frozen=True)
class ChosenPair:
    """Two samples of one prompt by their place in its scores; score(reference) > score(base)."""

    reference: int
    base: int


def choose_pairs(scores: Sequence[float], config: PairingConfig = PairingConfig()) -> list[ChosenPair]:
    """The pairs of one prompt from the scores of its n samples.

    Samples are ranked by score, equal scores by their place (the earlier one ranks higher). The best
    `reference_share` are references and serve `reference_uses` pairs each; the worst `base_share` are bases.
    Numbers are rounded down, but at least one reference and one base are taken; what is in both shares is a
    reference only. By `dealing`, who meets whom:
    * worst_first: references in rank order, all of them once before any twice; bases from the worst up, so that the
      best reference meets the worst base.
    * rank_order (released code): references in rank order, all uses of one before the next; bases from the best down.
    Pairs beyond either supply are left out, so are pairs whose reference does not score more than its base. One
    sample, or equal scores, give no pair.

    With the defaults (released code: best quarter twice, worst half): n = 4 gives 2 pairs of one reference, n = 7
    gives 1 reference, 3 bases and 2 pairs. Raises NonFiniteError for scores that are NaN or infinite.
    """
    _require_finite(scores)
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])  # stable: equal scores stay in order
    references = ranked[: max(1, math.floor(len(ranked) * config.reference_share))]
    rest = ranked[len(references) :]
    bases = rest[::-1][: max(1, math.floor(len(ranked) * config.base_share))]
    uses = references * config.reference_uses
    if config.dealing == "rank_order":
        uses, bases = sorted(uses, key=references.index), bases[::-1]
    dealt = zip(uses, bases, strict=False)
    return [ChosenPair(reference, base) for reference, base in dealt if scores[reference] > scores[base]]


def adopt(
    target_score: float, base_score: float, reference_score: float, config: PairingConfig = PairingConfig()
) -> bool:
    """Eq. 7: whether the target takes part in training; where not, the reference does in its place.

    Adopted when r(target) >= lambda * r(base), or r(reference) with `adoption_against="reference"`. The formula is
    lost in the paper's text; this is its strict reading, equality included. With lambda = 0 every target is adopted
    (released code). Beware of negative scores: the product with lambda > 1 then lies below the score, so that a worse
    target is adopted (and above it for lambda < 1). Use lambda = 1 for scorers that can be negative. Raises
    NonFiniteError.
    """
    _require_finite((target_score, base_score, reference_score))
    against = base_score if config.adoption_against == "base" else reference_score
    return config.adoption_threshold == 0 or target_score >= config.adoption_threshold * against


def _require_finite(scores: Sequence[float]) -> None:
    bad = [i for i, score in enumerate(scores) if not math.isfinite(score)]
    if bad:
        raise NonFiniteError(f"scores: expected finite numbers, got {[scores[i] for i in bad]} at {bad}")
