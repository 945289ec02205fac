"""Comparing models by their scores on the same prompts and seeds (sections 4.3 and 4.5; table 1). Imports no torch.

Scores of one prompt are alike, so the prompts are what a result is uncertain over: confidence intervals come from a
bootstrap that draws prompts, each with all its samples, with replacement (B. Efron and R. Tibshirani, "An Introduction
to the Bootstrap", 1993, chapter 13: percentile intervals). All models are scored on the same images' seeds, and
differences are taken image by image before they are averaged. Where a setting was trained several times, from other
seeds, trainings are resampled, too (`Bootstrap.crossed_interval`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dfusion.errors import InvalidInputError, NonFiniteError, ShapeMismatchError

_DRAWS_AT_ONCE = 1 << 20
"""Numbers that a bootstrap holds at once."""


@dataclass(frozen=True)
class ScoreRow:
    """One score. `scorer` should name the version too, "clip-vit-h-14@laion2b_s32b_b79k": versions do not compare."""

    model: str
    prompt: str
    seed: int
    scorer: str
    value: float


@dataclass(frozen=True)
class ScoreTable:
    """The scores of M models on P prompts, with S seeds a prompt, by R scorers.

    models, prompts, scorers  their names, each once
    seeds                     for each prompt its S seeds, the same for all models
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
                raise InvalidInputError(f"{name}: expected at least one and each once, got {list(names)}")
        if len(self.seeds) != len(self.prompts):
            raise InvalidInputError(f"seeds: expected those of {len(self.prompts)} prompts, got {len(self.seeds)}")
        counts = {len(seeds) for seeds in self.seeds}
        if len(counts) != 1 or 0 in counts:
            raise InvalidInputError(f"seeds: expected the same number for every prompt, got {sorted(counts)}")
        shape = (len(self.models), len(self.prompts), counts.pop(), len(self.scorers))
        if self.values.shape != shape:
            raise ShapeMismatchError("values", shape, self.values.shape)
        if not np.isfinite(self.values).all():
            raise NonFiniteError("values: a score is NaN or infinite")

    @classmethod
    def from_rows(cls, rows: Iterable[ScoreRow]) -> ScoreTable:
        """The table of all rows; models, prompts, seeds and scorers in the order in which they first come.

        Raises InvalidInputError where there are no rows, a score is missing (every model needs every prompt's seeds
        by every scorer) or comes twice, or prompts have different numbers of seeds.
        """
        found: dict[tuple[str, str, int, str], float] = {}
        for row in rows:
            key = (row.model, row.prompt, row.seed, row.scorer)
            if key in found:
                raise InvalidInputError(f"rows: expected one score of {key}, got two")
            found[key] = row.value
        if not found:
            raise InvalidInputError("rows: expected at least one score, got none")
        models = tuple(dict.fromkeys(model for model, _, _, _ in found))
        scorers = tuple(dict.fromkeys(scorer for _, _, _, scorer in found))
        seeds: dict[str, dict[int, None]] = {}
        for _, prompt, seed, _ in found:
            seeds.setdefault(prompt, {})[seed] = None
        images = [(prompt, seed) for prompt, own in seeds.items() for seed in own]
        keys = [(model, prompt, seed, scorer) for model in models for prompt, seed in images for scorer in scorers]
        for key in keys:
            if key not in found:
                raise InvalidInputError(f"rows: expected the same prompts and seeds for all, got no score of {key}")
        own_seeds = tuple(tuple(own) for own in seeds.values())
        counts = {len(own) for own in own_seeds}
        if len(counts) != 1:
            raise InvalidInputError(f"rows: expected as many seeds for every prompt, got {sorted(counts)}")
        values = np.array([found[key] for key in keys], dtype=np.float64)
        shape = (len(models), len(seeds), counts.pop(), len(scorers))
        return cls(models, tuple(seeds), own_seeds, scorers, values.reshape(shape))

    def of_prompts(self, prompts: Sequence[str]) -> ScoreTable:
        """The table of these prompts alone, in this order. Raises InvalidInputError for prompts that it lacks."""
        chosen = [_place(prompt, self.prompts, "prompt") for prompt in prompts]
        seeds = tuple(self.seeds[i] for i in chosen)
        return ScoreTable(self.models, tuple(prompts), seeds, self.scorers, self.values[:, chosen])

    def scores(self, model: str, scorer: str) -> np.ndarray:
        """(P, S) float64 of one model by one scorer. Raises InvalidInputError for names that the table lacks."""
        place = _place(model, self.models, "model"), _place(scorer, self.scorers, "scorer")
        found: np.ndarray = self.values[place[0], :, :, place[1]]
        return found


def _place(name: str, names: Sequence[str], kind: str) -> int:
    if name not in names:
        raise InvalidInputError(f"{kind}: expected one of {list(names)}, got {name!r}")
    return list(names).index(name)


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: their confidence, how many resamples, and the seed of the draws."""

    confidence: float = 0.95
    resamples: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1 or self.resamples < 1 or self.seed < 0:
            raise InvalidInputError(f"expected 0 < confidence < 1, resamples >= 1, seed >= 0, got {self}")

    def interval(self, values: np.ndarray) -> tuple[float, float] | None:
        """The percentile interval of the mean of `values` (n,), resampled with replacement; None for a single one.

        The same seed and n draw the same rows, so intervals of different models rest on the same resamples.
        """
        if len(values) < 2:
            return None
        rng, means = np.random.default_rng(self.seed), np.empty(self.resamples)
        step = max(1, _DRAWS_AT_ONCE // len(values))
        for start in range(0, self.resamples, step):
            stop = min(start + step, self.resamples)
            means[start:stop] = values[rng.integers(len(values), size=(stop - start, len(values)))].mean(1)
        return self._percentiles(means)

    def crossed_interval(self, values: np.ndarray) -> tuple[float, float] | None:
        """The percentile interval of the mean of `values` (R, P), with R trainings and P prompts resampled apart.

        Every training is measured on every prompt, so the two are crossed: rows and columns are drawn independently
        (A. B. Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1(2), 2007). A single row or column is
        not resampled; None where there is a single value. Equal shapes are resampled alike.
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
    """(resamples, n) float64: the share that each of n has in a resample with replacement. Not to be changed."""
    shares = np.random.default_rng([seed, axis]).multinomial(n, np.full(n, 1 / n), resamples) / n
    shares.flags.writeable = False
    return shares


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` images, with its interval; None where there is nothing to resample."""

    mean: float
    interval: tuple[float, float] | None
    count: int


@dataclass(frozen=True)
class Summary:
    """One model by one scorer: over all prompts (resampled by prompt), and each prompt (resampled by image)."""

    model: str
    scorer: str
    overall: Estimate
    prompts: Mapping[str, Estimate]


def summarise(table: ScoreTable, bootstrap: Bootstrap = Bootstrap()) -> tuple[Summary, ...]:
    """Every model by every scorer, models first (figure 6 and table 1 are such means)."""
    return tuple(_summary(table, model, scorer, bootstrap) for model in table.models for scorer in table.scorers)


def _summary(table: ScoreTable, model: str, scorer: str, bootstrap: Bootstrap) -> Summary:
    scores = table.scores(model, scorer)
    each = {
        prompt: Estimate(float(own.mean()), bootstrap.interval(own), len(own))
        for prompt, own in zip(table.prompts, scores, strict=True)
    }
    return Summary(model, scorer, _over_prompts(scores, bootstrap), each)


def _over_prompts(values: np.ndarray, bootstrap: Bootstrap) -> Estimate:
    """The mean of values (P, S), resampled by prompt: prompts have equally many images, so means of means are means."""
    return Estimate(float(values.mean()), bootstrap.interval(values.mean(1)), values.size)


@dataclass(frozen=True)
class Counts:
    """On how many prompts (or images) the one is better, worse, or equal."""

    better: int
    worse: int
    equal: int

    @property
    def chance(self) -> float:
        """The two-sided sign test: how likely so uneven a split is where both are equally good; 1 without any."""
        decided, fewer = self.better + self.worse, min(self.better, self.worse)
        tail = term = 1  # binomials one from the other
        for k in range(fewer):
            term = term * (decided - k) // (k + 1)
            tail += term
        return min(1.0, 2 * tail / (1 << decided))


@dataclass(frozen=True)
class Comparison:
    """A model against a baseline by one scorer: mean difference (positive: the model is better), and who wins where."""

    model: str
    baseline: str
    scorer: str
    difference: Estimate
    prompts: Counts
    images: Counts


def compare(
    table: ScoreTable, model: str, baseline: str, scorer: str, bootstrap: Bootstrap = Bootstrap()
) -> Comparison:
    """Paired by prompt and seed: the difference of each image is taken first, then resampled by prompt.

    Raises InvalidInputError for names that the table lacks, or a model against itself.
    """
    if model == baseline:
        raise InvalidInputError(f"baseline: expected another model than {model!r}, got the same")
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
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    return Counts(better, worse, differences.size - better - worse)
