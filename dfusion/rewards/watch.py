"""Whether a rising reward means better images: the diversity of samples, and a warning where other figures fall.

A model can learn to please its reward alone. Two figures that are never trained on show it: the mean of a held-out
scorer, and how different the samples of one prompt still are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from dfusion.errors import InvalidInputError, NonFiniteError, ShapeMismatchError


@dataclass(frozen=True)
class Diversity:
    """The mean over prompts, and each prompt's mean pairwise distance; prompts with one sample are left out."""

    mean: float
    prompts: Mapping[str, float]


def mean_pairwise_distance(features: np.ndarray, metric: Literal["cosine", "rms"] = "cosine") -> float:
    """The mean distance of the n * (n - 1) / 2 pairs of features (n, ...), n of 2 or more.

    "cosine" is 1 - cos, in [0, 2], for embeddings; "rms" the root of the mean squared difference, for latents.
    Raises ShapeMismatchError, and NonFiniteError where a distance is not defined.
    """
    if features.ndim < 2 or len(features) < 2:
        raise ShapeMismatchError("features", "(n, ...) with n of 2 or more", tuple(features.shape))
    flat = features.reshape(len(features), -1).astype(np.float64)
    if not np.isfinite(flat).all():
        raise NonFiniteError("features: expected finite numbers, got NaN or infinity")
    if metric == "cosine":
        lengths = np.linalg.norm(flat, axis=1, keepdims=True)
        if (lengths == 0).any():
            raise NonFiniteError("features: expected vectors other than 0, got one without a direction")
        unit = flat / lengths
        distances = 1 - unit @ unit.T
    else:
        squares = np.square(flat).mean(1)
        products = flat @ flat.T / flat.shape[1]
        distances = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * products, 0))
    return float(distances[np.triu_indices(len(flat), 1)].mean())


def diversity(features: np.ndarray, prompts: Sequence[str], metric: Literal["cosine", "rms"] = "cosine") -> Diversity:
    """How different the samples of each prompt are: features (B, ...), with the prompt of each sample.

    Take embeddings of `ClipScorer.features`, or clean latents with metric "rms". Raises ShapeMismatchError,
    NonFiniteError, and InvalidInputError where no prompt has two samples.
    """
    if len(features) != len(prompts):
        raise ShapeMismatchError("features", f"({len(prompts)}, ...)", tuple(features.shape))
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    found = {
        prompt: mean_pairwise_distance(features[chosen], metric) for prompt, chosen in rows.items() if len(chosen) > 1
    }
    if not found:
        raise InvalidInputError(f"prompts: expected two samples of some prompt, got one of each of {len(rows)}")
    return Diversity(float(np.mean(list(found.values()))), found)


def falling_figures(
    reward: Sequence[float],
    others: Mapping[str, Sequence[float]],
    *,
    window: int = 6,
    level: float = 0.05,
) -> tuple[str, ...]:
    """The names of the figures in `others` that fall while the reward rises: warn if there are any.

    reward, others  the same rounds' means, oldest first (`others`: a held-out scorer's, the diversity's)
    window          how many of the last rounds are looked at; at the default level fewer than 4 cannot warn
    level           how likely a trend may be by chance

    A series rises where the one-sided Mann-Kendall test (H. B. Mann, "Nonparametric tests against trend", 1945) says
    so at `level`: it counts pairs of rounds that rise and that fall, so neither scales nor units matter. Raises
    ShapeMismatchError where series differ in length, InvalidInputError, NonFiniteError.
    """
    if not 4 <= window <= 100 or not 0 < level < 1:
        raise InvalidInputError(f"expected window in 4 to 100 and level between 0 and 1, got {window} and {level}")
    for name, series in {"reward": reward, **others}.items():
        if len(series) != len(reward):
            raise ShapeMismatchError(name, f"{len(reward)} rounds", len(series))
        if not np.isfinite(np.asarray(series, dtype=np.float64)).all():
            raise NonFiniteError(f"{name}: a round's figure is NaN or infinite")
    if chance_of_rise(reward[-window:]) > level:
        return ()
    return tuple(
        name for name, series in others.items() if chance_of_rise([-value for value in series[-window:]]) <= level
    )


def chance_of_rise(series: Sequence[float]) -> float:
    """How likely n distinct numbers in random order rise as clearly as these: the one-sided p of Mann and Kendall.

    Exact: the share of orders with at most as many falling pairs. Equal numbers count as falling, so ties never make a
    trend look clearer.
    """
    count = len(series)
    falling = sum(b <= a for a, b in combinations(series, 2))
    # Permutations of n by their number of falling pairs: n - 1 more are possible with every further number.
    ways = [1]
    for n in range(2, count + 1):
        ways = [sum(ways[max(0, total - n + 1) : total + 1]) for total in range(len(ways) + n - 1)]
    return sum(ways[: falling + 1]) / sum(ways)
