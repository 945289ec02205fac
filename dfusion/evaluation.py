"""Compare models by their scores on the same prompts and seeds (sections 4.3 and 4.5; table 1). Does not import torch.

Scores of one prompt are similar, so prompts are the unit of uncertainty. Confidence intervals come from a bootstrap
that resamples prompts, each with all its samples, with replacement (B. Efron and R. Tibshirani, "An Introduction to the
Bootstrap", 1993, chapter 13: percentile intervals). All models are scored on the same seeds, and differences are
computed per image before they are averaged. If a setting was trained several times, with different seeds, trainings are
resampled as well (`Bootstrap.crossed_interval`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import exp, lgamma, log

import numpy as np

from dfusion.errors import InvalidInputError, NonFiniteError, ShapeMismatchError, shortened

_CHUNK = 1 << 20
"""Numbers that a bootstrap holds in memory."""
_EXACT = 1000
"""Up to so many decisions, a sign test adds whole numbers; their length makes it slow for more."""
_NEGLIGIBLE = 1e-17


@dataclass(frozen=True)
class ScoreRow:
    """One score. `scorer` should include the version, as in "clip-vit-h-14@laion2b_s32b_b79k"."""

    model: str
    prompt: str
    seed: int
    scorer: str
    value: float


@dataclass(frozen=True)
class ScoreTable:
    """The scores of M models on P prompts, with S seeds per prompt, by R scorers.

    models, prompts, scorers  their names, each once
    seeds                     the S seeds of each prompt, the same for all models
    values                    (M, P, S, R) float64, finite
    """

    models: tuple[str, ...]
    prompts: tuple[str, ...]
    seeds: tuple[tuple[int, ...], ...]
    scorers: tuple[str, ...]
    values: np.ndarray

    def __post_init__(self) -> None:
        for name, names in (("models", self.models), ("prompts", self.prompts), ("scorers", self.scorers)):
            if not names or len(set(names)) != len(names):
                raise InvalidInputError(f"{name}: expected at least one and each once, got {shortened(list(names))}")

        if len(self.seeds) != len(self.prompts):
            raise InvalidInputError(
                f"seeds: expected one entry per prompt ({len(self.prompts)}), got {len(self.seeds)}"
            )
        counts = {len(seeds) for seeds in self.seeds}
        if len(counts) != 1 or 0 in counts:
            raise InvalidInputError(f"seeds: expected the same number for every prompt, got {sorted(counts)}")

        shape = (len(self.models), len(self.prompts), counts.pop(), len(self.scorers))
        if self.values.shape != shape:
            raise ShapeMismatchError("values", shape, self.values.shape)
        if not np.isfinite(self.values).all():
            raise NonFiniteError("values: expected finite scores, got NaN or infinity")

    @classmethod
    def from_rows(cls, rows: Iterable[ScoreRow]) -> ScoreTable:
        """The table of all rows. Models, prompts, seeds and scorers are in the order of their first occurrence.

        Raises InvalidInputError without rows, if a score is missing (every model needs all seeds of all prompts by all
        scorers) or duplicated, or if prompts have different numbers of seeds.
        """
        # 1. the scores by key
        scores: dict[tuple[str, str, int, str], float] = {}
        for row in rows:
            key = (row.model, row.prompt, row.seed, row.scorer)
            if key in scores:
                raise InvalidInputError(f"rows: expected one score of {key}, got two")
            scores[key] = row.value
        if not scores:
            raise InvalidInputError("rows: expected at least one score, got none")

        # 2. the axes of the table
        models = tuple(dict.fromkeys(model for model, _, _, _ in scores))
        scorers = tuple(dict.fromkeys(scorer for _, _, _, scorer in scores))
        seeds_of: dict[str, dict[int, None]] = {}
        for _, prompt, seed, _ in scores:
            seeds_of.setdefault(prompt, {})[seed] = None

        # 3. the values, each exactly once
        values = []
        for model, prompt in product(models, seeds_of):
            for seed, scorer in product(seeds_of[prompt], scorers):
                key = (model, prompt, seed, scorer)
                if key not in scores:
                    raise InvalidInputError(f"rows: expected the same prompts and seeds for all, got no score of {key}")
                values.append(scores[key])
        seeds = tuple(map(tuple, seeds_of.values()))
        counts = set(map(len, seeds))
        if len(counts) != 1:
            raise InvalidInputError(f"rows: expected the same number of seeds for every prompt, got {sorted(counts)}")

        shape = (len(models), len(seeds), counts.pop(), len(scorers))
        return cls(models, tuple(seeds_of), seeds, scorers, np.array(values, dtype=np.float64).reshape(shape))

    def of_prompts(self, prompts: Sequence[str]) -> ScoreTable:
        """The table of these prompts only, in this order. Raises InvalidInputError for unknown prompts."""
        indices = [_index(prompt, self.prompts, "prompt") for prompt in prompts]
        seeds = tuple(self.seeds[i] for i in indices)
        return ScoreTable(self.models, tuple(prompts), seeds, self.scorers, self.values[:, indices])

    def scores(self, model: str, scorer: str) -> np.ndarray:
        """(P, S) float64 of one model by one scorer. Raises InvalidInputError for unknown names."""
        model_index = _index(model, self.models, "model")
        scorer_index = _index(scorer, self.scorers, "scorer")
        scores: np.ndarray = self.values[model_index, :, :, scorer_index]
        return scores


def _index(name: str, names: Sequence[str], kind: str) -> int:
    if name not in names:
        raise InvalidInputError(f"{kind}: expected one of {shortened(list(names))}, got {name!r}")
    return list(names).index(name)


@dataclass(frozen=True)
class Bootstrap:
    """Settings of the intervals: confidence, number of resamples, and seed."""

    confidence: float = 0.95
    resamples: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1 or self.resamples < 1 or self.seed < 0:
            raise InvalidInputError(f"expected 0 < confidence < 1, resamples >= 1, seed >= 0, got {self}")

    def interval(self, values: np.ndarray) -> tuple[float, float] | None:
        """The percentile interval of the mean of `values` (n,), resampled with replacement. None if n is 1.

        The same seed and n give the same resamples, so intervals of different models are comparable.
        """
        if len(values) < 2:
            return None

        rng = np.random.default_rng(self.seed)
        means = np.empty(self.resamples)
        step = max(1, _CHUNK // len(values))
        for start in range(0, self.resamples, step):
            stop = min(start + step, self.resamples)
            means[start:stop] = values[rng.integers(len(values), size=(stop - start, len(values)))].mean(1)
        return self._percentiles(means)

    def crossed_interval(self, values: np.ndarray) -> tuple[float, float] | None:
        """The percentile interval of the mean of `values` (R, P), with R trainings and P prompts resampled separately.

        Every training is measured on every prompt, so rows and columns are crossed and resampled independently (A. B.
        Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1(2), 2007). A single row or column is not
        resampled. None for a single value. Equal shapes have the same resamples.
        """
        if values.size < 2:
            return None
        rows, columns = (_shares(self.seed, axis, n, self.resamples) for axis, n in enumerate(values.shape))
        return self._percentiles(((rows @ values) * columns).sum(1))

    def _percentiles(self, means: np.ndarray) -> tuple[float, float]:
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(means, [tail, 1 - tail])
        return float(low), float(high)


@lru_cache(maxsize=8)
def _shares(seed: int, axis: int, n: int, resamples: int) -> np.ndarray:
    """(resamples, n) float64: the share of each of n elements in a resample with replacement. Read-only."""
    shares = np.random.default_rng([seed, axis]).multinomial(n, np.full(n, 1 / n), resamples) / n
    shares.flags.writeable = False
    return shares


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` images, with its interval. None if there is nothing to resample."""

    mean: float
    interval: tuple[float, float] | None
    count: int


@dataclass(frozen=True)
class Summary:
    """One model by one scorer: over all prompts (resampled by prompt), and for each prompt (resampled by image)."""

    model: str
    scorer: str
    overall: Estimate
    prompts: Mapping[str, Estimate]


def summarise(table: ScoreTable, bootstrap: Bootstrap = Bootstrap()) -> tuple[Summary, ...]:
    """Every model by every scorer, models first (figure 6 and table 1 are such means)."""
    return tuple(_summary(table, model, scorer, bootstrap) for model, scorer in product(table.models, table.scorers))


def _summary(table: ScoreTable, model: str, scorer: str, bootstrap: Bootstrap) -> Summary:
    scores = table.scores(model, scorer)
    by_prompt = {
        prompt: Estimate(float(own.mean()), bootstrap.interval(own), len(own))
        for prompt, own in zip(table.prompts, scores, strict=True)
    }
    return Summary(model, scorer, _over_prompts(scores, bootstrap), by_prompt)


def _over_prompts(values: np.ndarray, bootstrap: Bootstrap) -> Estimate:
    """The mean of values (P, S), resampled by prompt. All prompts have S images, so the mean of means is the mean."""
    return Estimate(float(values.mean()), bootstrap.interval(values.mean(1)), values.size)


@dataclass(frozen=True)
class Counts:
    """The numbers of prompts (or images) on which the model is better, worse, or equal."""

    better: int
    worse: int
    equal: int

    @property
    def chance(self) -> float:
        """The p-value of the two-sided sign test. It is 1 if nothing was decided."""
        decided = self.better + self.worse
        fewer = min(self.better, self.worse)
        if decided > _EXACT:
            return min(1.0, 2 * _tail(decided, fewer))
        tail = term = 1  # each binomial coefficient from the previous one
        for k in range(fewer):
            term = term * (decided - k) // (k + 1)
            tail += term
        return min(1.0, 2 * tail / (1 << decided))


def _tail(decided: int, fewer: int) -> float:
    """The probability of at most `fewer` of `decided` fair decisions, from the largest term down to negligible ones."""
    coefficient = lgamma(decided + 1) - lgamma(fewer + 1) - lgamma(decided - fewer + 1)
    term = exp(coefficient - decided * log(2))
    tail = 0.0
    for k in range(fewer, -1, -1):
        if term <= tail * _NEGLIGIBLE:
            break
        tail += term
        term *= k / (decided - k + 1)
    return tail


@dataclass(frozen=True)
class Comparison:
    """A model against a baseline by one scorer: the mean difference (positive: the model is better), and the wins."""

    model: str
    baseline: str
    scorer: str
    difference: Estimate
    prompts: Counts
    images: Counts


def compare(
    table: ScoreTable, model: str, baseline: str, scorer: str, bootstrap: Bootstrap = Bootstrap()
) -> Comparison:
    """Compare a model with a baseline, paired by prompt and seed.

    Args:
        table: The scores of both models.
        model: The model.
        baseline: The model to compare with.
        scorer: The scorer.
        bootstrap: The settings of the interval. Differences per image are resampled by prompt.

    Returns:
        The mean difference with its interval, and the numbers of prompts and images won.

    Raises:
        InvalidInputError: Names that the table lacks, or a model compared with itself.
    """
    if model == baseline:
        raise InvalidInputError(f"baseline: expected a model other than {model!r}, got the same")

    differences = table.scores(model, scorer) - table.scores(baseline, scorer)
    return Comparison(
        model,
        baseline,
        scorer,
        _over_prompts(differences, bootstrap),
        _counts(differences.mean(1)),
        _counts(differences),
    )


def _counts(differences: np.ndarray) -> Counts:
    better = int((differences > 0).sum())
    worse = int((differences < 0).sum())
    return Counts(better, worse, differences.size - better - worse)
