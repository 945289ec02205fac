"""Preference rates of a human preference test (section 4.2; figure 6). Does not import torch.

Each answer chooses the best of the images that all models made of one prompt and seed, or none. The intervals are those
of E. B. Wilson ("Probable inference, the law of succession, and statistical inference", 1927), which are within 0 and 1
also for few answers. They take answers as independent: if few raters give many answers each, they are too narrow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from math import sqrt
from statistics import NormalDist

from dfusion.errors import InvalidInputError
from dfusion.evaluation import Counts


@dataclass(frozen=True)
class Rate:
    """A number of answers among `total`. Rate and interval are None without answers."""

    count: int
    total: int
    confidence: float

    def __post_init__(self) -> None:
        if not 0 <= self.count <= self.total or not 0 < self.confidence < 1:
            raise InvalidInputError(f"expected 0 <= count <= total and 0 < confidence < 1, got {self}")

    @property
    def rate(self) -> float | None:
        """The share of the total."""
        return self.count / self.total if self.total else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The Wilson interval of the share."""
        if not self.total:
            return None
        z = -NormalDist().inv_cdf((1 - self.confidence) / 2)  # (1 + confidence) / 2 may round to 1
        share = self.count / self.total
        weight = z * z / self.total
        middle = (share + weight / 2) / (1 + weight)
        half = z * sqrt(share * (1 - share) / self.total + weight / self.total / 4) / (1 + weight)
        # the ends are exact in theory only
        return (0.0 if self.count == 0 else middle - half), (1.0 if self.count == self.total else middle + half)


@dataclass(frozen=True)
class PairRate:
    """Two models: how often `model` was chosen among the answers that chose one of both.

    `chance` is the p-value of the two-sided sign test that both are chosen equally often.
    """

    model: str
    other: str
    wins: Rate
    chance: float


@dataclass(frozen=True)
class Preferences:
    """The preference rates of a set of answers.

    Attributes:
        answers: Their number.
        models: How often each model was chosen, among all answers.
        none: How often no image was chosen.
        pairs: The comparisons of two models.
    """

    answers: int
    models: Mapping[str, Rate]
    none: Rate
    pairs: tuple[PairRate, ...]


def preferences(wins: Mapping[str, int], none: int, confidence: float = 0.95) -> Preferences:
    """Compute the preference rates.

    Args:
        wins: The number of answers that chose each model.
        none: The number of answers that chose no image.
        confidence: The confidence level of the intervals.

    Returns:
        The rates, with models in the order of `wins`.

    Raises:
        InvalidInputError: A number is negative, or the confidence is not between 0 and 1.

    Example:
        >>> preferences({"base": 6, "tuned": 14}, none=0).models["tuned"].interval
        (0.48, 0.85)  # rounded
    """
    answers = sum(wins.values()) + none
    models = {model: Rate(count, answers, confidence) for model, count in wins.items()}
    pairs = []
    for model, other in combinations(wins, 2):
        decided = Rate(wins[model], wins[model] + wins[other], confidence)
        chance = Counts(wins[model], wins[other], 0).chance
        pairs.append(PairRate(model, other, decided, chance))
    return Preferences(answers, models, Rate(none, answers, confidence), tuple(pairs))
