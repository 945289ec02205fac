"""Choice of references and bases (section "Choosing pairs"), and adoption of targets (Eq. 7)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dfusion.config import PairingConfig
from dfusion.errors import NonFiniteError, shortened


@dataclass(frozen=True)
class ChosenPair:
    """Two samples of one prompt, by their index in its scores; score(reference) > score(base)."""

    reference: int
    base: int


def choose_pairs(scores: Sequence[float], config: PairingConfig = PairingConfig()) -> list[ChosenPair]:
    """The pairs of one prompt from the scores of its n samples.

    Samples are ranked by score. Of equal scores, the earlier sample ranks higher. The best `reference_share` are
    references, used in `reference_uses` pairs each. The worst `base_share` are bases. Both numbers are rounded down but
    are at least 1. A sample in both shares is a reference only. `dealing` determines which reference meets which base:

    * worst_first: references in rank order, each once before any is used twice; bases from the worst up. The best
      reference meets the worst base.
    * rank_order (released code): references in rank order, all uses of one before the next; bases from the best down.

    A pair needs a free reference and a free base, and its reference must score more than its base. One sample, or equal
    scores, give no pair. With the defaults (released code: best quarter twice, worst half), n = 4 gives 2 pairs of one
    reference, and n = 7 gives 1 reference, 3 bases and 2 pairs.

    Raises:
        NonFiniteError: A score is NaN or infinite.
    """
    _require_finite(scores)

    # 1. references and bases
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])  # stable: equal scores stay in order
    references = ranked[: max(1, math.floor(len(ranked) * config.reference_share))]
    rest = ranked[len(references) :]
    bases = rest[::-1][: max(1, math.floor(len(ranked) * config.base_share))]

    # 2. pairs of them
    uses = references * config.reference_uses
    if config.dealing == "rank_order":
        uses = sorted(uses, key=references.index)
        bases = bases[::-1]
    candidates = zip(uses, bases, strict=False)
    return [ChosenPair(reference, base) for reference, base in candidates if scores[reference] > scores[base]]


def adopt(
    target_score: float, base_score: float, reference_score: float, config: PairingConfig = PairingConfig()
) -> bool:
    """Eq. 7: whether the target is trained on. Otherwise the reference takes its place.

    A target is adopted if r(target) >= lambda * r(base), or r(reference) with `adoption_against="reference"`. The
    formula is missing in the paper's text; this is its strict reading, including equality. With lambda = 0 every target
    is adopted (released code). Use lambda = 1 for scorers with negative scores: the product with lambda > 1 is then
    below the score, so a worse target would be adopted. Raises NonFiniteError.
    """
    _require_finite((target_score, base_score, reference_score))
    against = base_score if config.adoption_against == "base" else reference_score
    return config.adoption_threshold == 0 or target_score >= config.adoption_threshold * against


def _require_finite(scores: Sequence[float]) -> None:
    bad = [i for i, score in enumerate(scores) if not math.isfinite(score)]
    if bad:
        got = shortened([scores[i] for i in bad])
        raise NonFiniteError(f"scores: expected finite numbers, got {got} at {shortened(bad)}")
