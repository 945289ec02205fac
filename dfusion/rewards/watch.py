"""Detect reward hacking: the diversity of samples, and a warning if other metrics fall while the reward rises.

A model can learn to exploit its reward without better images. Two metrics that are never trained on reveal it: the mean
of a held-out scorer, and the diversity of one prompt's samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import isfinite
from typing import TYPE_CHECKING, Literal

from dfusion.errors import InvalidInputError, NonFiniteError, ShapeMismatchError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Diversity:
    """The mean over prompts, and each prompt's mean pairwise distance. Prompts with one sample are left out."""

    mean: float
    prompts: Mapping[str, float]


def mean_pairwise_distance(features: np.ndarray, metric: Literal["cosine", "rms"] = "cosine") -> float:
    """The mean distance of the n * (n - 1) / 2 pairs of features (n, ...), with n >= 2.

    "cosine" is 1 - cos, in [0, 2], for embeddings. "rms" is the root of the mean squared difference, for latents.
    Raises ShapeMismatchError, and NonFiniteError if a distance is undefined.
    """
    import numpy as np  # not by the command line, which only tests trends

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
    """The diversity of each prompt's samples, from features (B, ...) and the prompt of each sample.

    Use embeddings of `ClipScorer.features`, or clean latents with metric "rms". Raises ShapeMismatchError,
    NonFiniteError, and InvalidInputError if no prompt has two samples.
    """
    import numpy as np

    if len(features) != len(prompts):
        raise ShapeMismatchError("features", f"({len(prompts)}, ...)", tuple(features.shape))

    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)

    distances = {}
    for prompt, own in rows.items():
        if len(own) > 1:
            distances[prompt] = mean_pairwise_distance(features[own], metric)
    if not distances:
        raise InvalidInputError(f"prompts: expected two samples of some prompt, got one of each of {len(rows)}")
    return Diversity(float(np.mean(list(distances.values()))), distances)


def falling_figures(
    reward: Sequence[float],
    others: Mapping[str, Sequence[float]],
    *,
    window: int = 6,
    level: float = 0.05,
) -> tuple[str, ...]:
    """The names of the metrics in `others` that fall while the reward rises. Warn if there are any.

    The trend test is the one-sided Mann-Kendall test (H. B. Mann, "Nonparametric tests against trend", 1945). It counts
    rising and falling pairs of rounds, so it does not depend on scale or unit.

    Args:
        reward: The reward's mean in each round, oldest first.
        others: The same rounds' means of other metrics, such as a held-out scorer and the diversity.
        window: The number of last rounds to test. At the default level at least 4 are needed for a warning.
        level: The significance level of a trend.

    Raises:
        ShapeMismatchError: Series of different lengths.
        InvalidInputError: A window or level outside its range.
        NonFiniteError: A mean that is NaN or infinite.
    """
    if not 4 <= window <= 100 or not 0 < level < 1:
        raise InvalidInputError(f"expected window in 4 to 100 and level between 0 and 1, got {window} and {level}")
    for name, series in {"reward": reward, **others}.items():
        if len(series) != len(reward):
            raise ShapeMismatchError(name, f"{len(reward)} rounds", len(series))
        if not all(map(isfinite, series)):
            raise NonFiniteError(f"{name}: expected finite means, got NaN or infinity")

    if chance_of_rise(reward[-window:]) > level:
        return ()
    falling = []
    for name, series in others.items():
        if chance_of_rise([-value for value in series[-window:]]) <= level:
            falling.append(name)
    return tuple(falling)


def chance_of_rise(series: Sequence[float]) -> float:
    """The one-sided p-value of the Mann-Kendall test: the chance that random order rises as clearly as `series`.

    It is exact: the share of permutations of n distinct numbers with at most as many falling pairs. Equal numbers count
    as falling, so ties never strengthen a trend.
    """
    count = len(series)
    falling = sum(b <= a for a, b in combinations(series, 2))

    # ways[k]: permutations of n numbers with k falling pairs; the n-th number adds 0 to n - 1 falling pairs
    ways = [1]
    for n in range(2, count + 1):
        ways = [sum(ways[max(0, total - n + 1) : total + 1]) for total in range(len(ways) + n - 1)]
    return sum(ways[: falling + 1]) / sum(ways)
