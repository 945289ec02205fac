"""A weighted sum of scorers, of their raw scores or of scores that are normalised by a run's scale."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from dfusion.errors import InvalidInputError
from dfusion.rewards import Scorer
from dfusion.rewards.checks import check_images, checked_scores
from dfusion.rewards.config import sum_name


@dataclass(frozen=True)
class PartScale:
    """The scale of one part's scores.

    count   scores so far
    mean    their mean
    std     their population standard deviation
    """

    count: int
    mean: float
    std: float

    @classmethod
    def of(cls, scores: Sequence[float]) -> PartScale:
        """The scale of at least one score."""
        return cls(len(scores), statistics.fmean(scores), statistics.pstdev(scores))

    def merged(self, other: PartScale) -> PartScale:
        """The scale of both series together."""
        count = self.count + other.count
        share = other.count / count
        difference = other.mean - self.mean
        variance = (1 - share) * self.std**2 + share * other.std**2 + share * (1 - share) * difference**2
        return PartScale(count, self.mean + share * difference, math.sqrt(variance))

    def normalised(self, scores: np.ndarray) -> np.ndarray:
        """(score - mean) / std. If all scores so far are equal, only the mean is subtracted."""
        return (scores - self.mean) / (self.std or 1.0)


@dataclass(frozen=True)
class RunningScale:
    """The scales of a run's parts, by scorer name. It is never changed: `extended` returns another one.

    Example:
        >>> from dfusion.rewards.weighted import RunningScale
        >>> scale = RunningScale().extended({"clip": [0.2, 0.4]})
        >>> scale.parts["clip"].mean, RunningScale.from_state(scale.state()) == scale
        (0.30000000000000004, True)
    """

    parts: Mapping[str, PartScale] = field(default_factory=dict)

    def extended(self, scores: Mapping[str, Sequence[float]]) -> RunningScale:
        """The scale that also covers these scores of each part."""
        parts = dict(self.parts)
        for name, values in scores.items():
            if values:
                new = PartScale.of(values)
                parts[name] = parts[name].merged(new) if name in parts else new
        return RunningScale(parts)

    def state(self) -> dict[str, dict[str, float]]:
        """The state as JSON, to continue a run."""
        return {name: asdict(part) for name, part in self.parts.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Mapping[str, float]]) -> RunningScale:
        """The scale of a `state`."""
        return cls({name: PartScale(int(p["count"]), p["mean"], p["std"]) for name, p in state.items()})


class WeightedScorer:
    """The sum of weight * score over scorers. Its version names its parts with their weights.

    With `normalise`, each part's score is normalised by a scale (`scaled`) before it is weighted, so that a weight says
    how much a part counts, whatever its unit. Such a sum has no scores without a scale.
    """

    def __init__(
        self,
        parts: Sequence[tuple[float, Scorer]],
        *,
        name: str | None = None,
        normalise: bool = False,
        scale: RunningScale | None = None,
    ) -> None:
        """`parts` are (weight, scorer). Raises InvalidInputError if there are none."""
        if not parts:
            raise InvalidInputError("parts: expected at least one scorer, got none")

        self.parts = tuple(parts)
        self.normalise = normalise
        self._scale = scale
        versions = [(weight, f"{scorer.name}@{scorer.version}") for weight, scorer in parts]
        self.version = sum_name(versions, normalise, 200)
        self.name = name or sum_name([(weight, scorer.name) for weight, scorer in parts], normalise, 100)

    def scaled(self, scale: RunningScale) -> WeightedScorer:
        """This sum with another scale."""
        return WeightedScorer(self.parts, name=self.name, normalise=self.normalise, scale=scale)

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        """The weighted sum for each image (B, H, W, 3) uint8. Raises as the parts do, and as `combined`."""
        check_images(images, prompts)
        self._require_scale()
        scores = [checked_scores(scorer.name, scorer.score(images, prompts), prompts) for _, scorer in self.parts]
        return checked_scores(self.name, self.combined(scores), prompts)

    def combined(self, scores: Sequence[Sequence[float]]) -> list[float]:
        """The weighted sum for each of B images, from the parts' scores (P, B).

        Raises InvalidInputError if the sum is normalised and has no scale of a part.
        """
        return [float(total) for total in sum(self._terms(scores))]  # type: ignore[union-attr]

    def shares(self, scores: Sequence[Sequence[float]]) -> list[float]:
        """Each part's share of the sum's variance over B images, from the parts' scores (P, B).

        The share is cov(weight * score, sum) / var(sum). Shares add up to 1; that of a part which works against the
        others is negative. All are 0 if the sum does not vary. Raises as `combined` does.
        """
        terms = np.stack(self._terms(scores))
        centred = terms - terms.mean(1, keepdims=True)
        total = centred.sum(0)
        variance = float((total**2).mean())
        if variance == 0:
            return [0.0] * len(terms)
        return [float(share) for share in (centred * total).mean(1) / variance]

    def _terms(self, scores: Sequence[Sequence[float]]) -> list[np.ndarray]:
        scale = self._require_scale()
        terms = []
        for (weight, scorer), values in zip(self.parts, scores, strict=True):
            series = np.asarray(values, np.float64)
            terms.append(weight * (scale.parts[scorer.name].normalised(series) if self.normalise else series))
        return terms

    def _require_scale(self) -> RunningScale:
        scale = self._scale or RunningScale()
        missing = [scorer.name for _, scorer in self.parts if scorer.name not in scale.parts]
        if self.normalise and missing:
            raise InvalidInputError(
                f"{self.name}: expected a scale of each part of a normalised sum, got none of {missing}"
            )
        return scale
