"""Normalised sums, by hand."""

from collections.abc import Sequence

import numpy as np
import pytest

from dfusion.errors import InvalidInputError
from dfusion.rewards import load_scorer
from dfusion.rewards.config import WeightedPart, WeightedScorerConfig
from dfusion.rewards.weighted import RunningScale, WeightedScorer

IMAGES = np.zeros((3, 4, 4, 3), np.uint8)
PROMPTS = ["x", "y", "z"]


class Fixed:
    version = "2"

    def __init__(self, name: str, scores: Sequence[float]) -> None:
        self.name = name
        self.scores = list(scores)

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:  # noqa: ARG002
        return self.scores


def test_a_normalised_sum_weights_standard_deviations() -> None:
    """a: mean 2, deviation 1; b: mean 300, deviation 100. A weight of 1 counts the same for both."""
    total = WeightedScorer([(1.0, Fixed("a", [1, 2, 4])), (-0.5, Fixed("b", [300, 500, 300]))], normalise=True)
    assert (total.name, total.version) == ("1.0*z(a)+-0.5*z(b)", "1.0*z(a@2)+-0.5*z(b@2)")

    scaled = total.scaled(RunningScale().extended({"a": [1, 3], "b": [200, 400]}))
    assert scaled.score(IMAGES, PROMPTS) == pytest.approx([-1 - 0.5 * 0, 0 - 0.5 * 2, 2 - 0.5 * 0])
    assert (scaled.name, scaled.version) == (total.name, total.version)


def test_a_running_scale_is_that_of_all_scores() -> None:
    """1, 3 and then 8: mean 4, variance ((-3)^2 + (-1)^2 + 4^2) / 3."""
    scale = RunningScale().extended({"a": [1, 3]})
    continued = RunningScale.from_state(scale.state()).extended({"a": [8], "b": []})
    part = continued.parts["a"]
    assert (part.count, part.mean) == (3, pytest.approx(4))
    assert part.std == pytest.approx((26 / 3) ** 0.5)
    assert set(continued.parts) == {"a"} and scale.parts["a"].count == 2

    # large scores with a small deviation lose no digits
    far = RunningScale().extended({"a": [1e9, 1e9 + 2]}).extended({"a": [1e9 + 1] * 2})
    assert far.parts["a"].std == pytest.approx(0.5**0.5)


def test_a_part_that_does_not_vary_only_loses_its_mean() -> None:
    total = WeightedScorer([(2.0, Fixed("a", [5, 5, 6]))], normalise=True)
    assert total.scaled(RunningScale().extended({"a": [5, 5]})).score(IMAGES, PROMPTS) == [0, 0, 2]


def test_a_normalised_sum_without_a_scale_has_no_scores() -> None:
    config = WeightedScorerConfig(parts=(WeightedPart(scorer="shapes-judge", weight=1),), normalise=True)
    total = load_scorer(config)
    with pytest.raises(InvalidInputError, match=r"a scale of each part .* none of \['shapes-judge'\]"):
        total.score(IMAGES, PROMPTS)


def test_shares_of_the_variance_by_hand() -> None:
    """Terms a = (1, -1, 0) and b = (2, 0, -2), centred, sum (3, -1, -2) with squares 14.

    cov(a, sum) = (3 + 1) / 3 and cov(b, sum) = (6 + 4) / 3 of var(sum) = 14 / 3.
    """
    total = WeightedScorer([(1.0, Fixed("a", [])), (2.0, Fixed("b", []))])
    scores = [[11.0, 9.0, 10.0], [4.0, 3.0, 2.0]]
    assert total.shares(scores) == pytest.approx([4 / 14, 10 / 14])

    penalty = WeightedScorer([(1.0, Fixed("a", [])), (-0.5, Fixed("b", []))])
    assert penalty.shares([[0.0, 2.0], [0.0, 2.0]]) == pytest.approx([2.0, -1.0])
    assert penalty.shares([[0.0, 1.0], [0.0, 2.0]]) == [0.0, 0.0]
