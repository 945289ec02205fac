import json
import math

import numpy as np
import pytest

from dfusion.advantages import RewardHistory
from dfusion.errors import CheckpointError, InvalidInputError, NonFiniteError


def test_by_hand() -> None:
    """1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5."""
    history = RewardHistory().extended({"a": [1, 2, 3, 6]})
    expected = [(r - 3) / math.sqrt(3.5) for r in (1, 2, 3, 6)]
    assert history.advantages("a", [1, 2, 3, 6]) == pytest.approx(expected)


def test_a_prompt_seen_before_uses_all_its_history() -> None:
    """Two rounds, and a prompt without samples in the second; numpy gives the expected values."""
    rounds = {"a": ([0.1, 0.4], [0.7, 0.9, 0.2]), "b": ([5.0, 7.0], [])}
    history = RewardHistory()
    for n in range(2):
        history = history.extended({prompt: scores[n] for prompt, scores in rounds.items() if scores[n]})
    everything = np.array([0.1, 0.4, 0.7, 0.9, 0.2])
    expected = (np.array([0.7, 0.9, 0.2]) - everything.mean()) / everything.std()

    np.testing.assert_allclose(history.advantages("a", [0.7, 0.9, 0.2]), expected, rtol=1e-12)
    assert history.advantages("b", [5.0, 7.0]) == [-1, 1]

    alone = RewardHistory().extended({"a": [0.7, 0.9, 0.2]}).advantages("a", [0.7])
    assert alone[0] != pytest.approx(expected[0])


def test_json_round_trip_is_exact() -> None:
    rng = np.random.default_rng(0)
    history = RewardHistory().extended({"a": rng.normal(size=20).tolist(), "b": [0.1 + 0.2]}, "clip 1")
    again = RewardHistory.from_json(json.loads(json.dumps(history.to_json())))
    more = {"a": rng.normal(size=20).tolist()}, "clip 1"
    assert again == history
    assert again.extended(*more).advantages("a", more[0]["a"]) == history.extended(*more).advantages("a", more[0]["a"])


def test_advantages_are_zero_without_variance() -> None:
    """One sample, or equal scores, also for a target with another score; 0.1 has no exact mean in naive sums."""
    history = RewardHistory().extended({"one": [0.3], "equal": [0.1] * 10})
    assert history.advantages("one", [0.3]) == [0]
    assert history.advantages("equal", [0.1, 0.9]) == [0, 0]


def test_advantages_are_accurate_far_from_zero() -> None:
    """1e9 + (0, 1, 2): a sum of squares would lose the variance of 2/3."""
    history = RewardHistory().extended({"a": [1e9, 1e9 + 1, 1e9 + 2]})
    assert history.advantages("a", [1e9 + 2]) == [pytest.approx(math.sqrt(1.5), rel=1e-12)]


def test_advantages_are_clipped_on_both_sides() -> None:
    """99 zeros and a 1: the 1 is (1 - 0.01) / sqrt(0.0099) = 9.95 standard deviations from the mean."""
    history = RewardHistory().extended({"a": [0.0] * 99 + [1.0]})
    assert history.advantages("a", [1.0, -1.0]) == [5, -5]
    assert history.advantages("a", [1.0], clip=20) == [pytest.approx(0.99 / math.sqrt(0.0099))]


def test_the_given_history_is_not_modified() -> None:
    history = RewardHistory().extended({"a": [1.0]})
    history.extended({"a": [2.0], "b": [3.0]})
    assert history == RewardHistory({"a": (1.0,)})


def test_bad_input() -> None:
    history = RewardHistory().extended({"a": [1.0, 2.0]})
    with pytest.raises(InvalidInputError, match="'b'"):
        history.advantages("b", [1.0])
    for bad in (math.nan, math.inf):
        with pytest.raises(NonFiniteError, match="'a'"):
            history.extended({"a": [bad]})
        with pytest.raises(NonFiniteError, match="'a'"):
            history.advantages("a", [bad])
    for scores in (None, [], {"a": 1.0}, {"a": ["1"]}, {1: [1.0]}, {"a": [True]}, {"a": [math.nan]}):
        with pytest.raises(CheckpointError, match="reward history"):
            RewardHistory.from_json({"scorer": None, "scores": scores})
    for value in (None, [], {}, {"scorer": 1, "scores": {}}):
        with pytest.raises(CheckpointError, match="reward history"):
            RewardHistory.from_json(value)
    for scorer in ("clip 2", None):
        with pytest.raises(InvalidInputError, match="scorer: expected 'clip 1'"):
            RewardHistory({"a": (1.0,)}, "clip 1").extended({"a": [2.0]}, scorer)
    assert RewardHistory({"a": (1.0,)}).extended({}, "clip 1") == RewardHistory({"a": (1.0,)}, "clip 1")
