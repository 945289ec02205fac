from collections.abc import Sequence
from itertools import combinations, permutations

import numpy as np
import pytest

from dfusion.errors import InvalidInputError, NonFiniteError, ShapeMismatchError
from dfusion.rewards.watch import chance_of_rise, diversity, falling_figures, mean_pairwise_distance


def test_distances_by_hand() -> None:
    # cosines of (1, 0), (0, 2), (3, 3): 0, 1/sqrt 2, 1/sqrt 2
    vectors = np.array([[1, 0], [0, 2], [3, 3]], np.float32)
    assert mean_pairwise_distance(vectors) == pytest.approx((1 + 2 * (1 - 0.5**0.5)) / 3)
    latents = np.zeros((2, 4, 2, 2), np.float32)
    latents[1, 0] = 2.0  # 4 of 16 numbers differ by 2: mean square 1
    assert mean_pairwise_distance(latents, "rms") == pytest.approx(1.0)
    assert mean_pairwise_distance(latents[[0, 0]], "rms") == 0


def test_distances_are_those_of_all_pairs() -> None:
    latents = np.random.default_rng(0).normal(size=(7, 3, 4))
    expected = [np.sqrt(np.square(a - b).mean()) for a, b in combinations(latents, 2)]
    assert mean_pairwise_distance(latents, "rms") == pytest.approx(np.mean(expected))


def test_diversity_is_computed_per_prompt() -> None:
    features = np.array([[1, 0], [1, 0], [0, 1], [-1, 0], [0, 1]])
    result = diversity(features, ["a", "b", "b", "a", "alone"])
    assert result.prompts == {"a": pytest.approx(2.0), "b": pytest.approx(1.0)}
    assert result.mean == pytest.approx(1.5)
    with pytest.raises(InvalidInputError, match="two samples"):
        diversity(features[:2], ["a", "b"])
    with pytest.raises(ShapeMismatchError):
        diversity(features, ["a"])


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_zero_features_are_rejected(value: float) -> None:
    with pytest.raises(NonFiniteError):
        mean_pairwise_distance(np.array([[1.0, 0.0], [value, 0.0]]))


def test_the_chance_of_a_trend_is_its_share_of_all_orders() -> None:
    def rising(series: Sequence[float]) -> int:
        return sum(b > a for a, b in combinations(series, 2))

    orders = [rising(order) for order in permutations(range(5))]
    for series in ([1, 2, 3, 4, 5], [2, 1, 3, 5, 4], [3, 5, 1, 4, 2], [5, 4, 3, 2, 1]):
        expected = np.mean([order >= rising(series) for order in orders])
        assert chance_of_rise(series) == pytest.approx(expected)
    assert chance_of_rise([1, 2, 2, 3]) == chance_of_rise([1, 2.1, 2, 3])  # a tie counts as a fall
    assert chance_of_rise([0.0] * 5) == 1


RISING = [0.30, 0.31, 0.305, 0.32, 0.33, 0.335, 0.34]
FALLING = [0.9, 0.88, 0.89, 0.85, 0.8, 0.79, 0.7]
STILL = [0.5, 0.52, 0.49, 0.51, 0.5, 0.52, 0.5]


def test_a_warning_names_what_falls_while_the_reward_rises() -> None:
    others = {"shapes-judge": FALLING, "diversity": STILL, "latents": [1000 * value for value in FALLING]}
    assert falling_figures(RISING, others) == ("shapes-judge", "latents")
    assert falling_figures(STILL, others) == ()
    assert falling_figures(FALLING, others) == ()
    assert falling_figures(RISING, {"judge": RISING, "diversity": STILL}) == ()


def test_only_the_last_rounds_count_and_four_are_needed() -> None:
    turned = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.59, 0.58, 0.5, 0.4, 0.3]
    reward = [0.01 * n for n in range(11)]
    assert falling_figures(reward, {"judge": turned}) == ("judge",)
    assert falling_figures(reward, {"judge": turned}, window=11) == ()
    assert falling_figures(reward[:4], {"judge": [4.0, 3.0, 2.0, 1.0]}) == ("judge",)
    assert falling_figures(reward[:3], {"judge": [3.0, 2.0, 1.0]}) == ()
    assert falling_figures([], {"judge": []}) == ()


def test_invalid_series_are_rejected() -> None:
    with pytest.raises(ShapeMismatchError, match="judge"):
        falling_figures(RISING, {"judge": FALLING[1:]})
    with pytest.raises(NonFiniteError, match="judge"):
        falling_figures([1.0], {"judge": [float("nan")]})
    for invalid in ({"window": 3}, {"level": 0.0}):
        with pytest.raises(InvalidInputError):
            falling_figures(RISING, {}, **invalid)
