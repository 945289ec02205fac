"""Preference rates and their intervals, with values computed by hand."""

import pytest

from dfusion.errors import InvalidInputError
from dfusion.preference_test import Rate, preferences


@pytest.mark.parametrize(
    ("count", "total", "interval"),
    [
        # z = 1.959964, z^2 = 3.841459
        # (5 + 1.920729) / 13.841459 = 0.5; 1.959964 sqrt(10 / 4 + 0.960365) / 13.841459 = 0.263407
        (5, 10, (0.236593, 0.763407)),
        # (0 + 1.920729) / 13.841459 = 0.138767, and the half width is the same
        (0, 10, (0.0, 0.277533)),
        (10, 10, (0.722467, 1.0)),
        # (81 + 1.920729) / 266.841459 = 0.310749;
        # 1.959964 sqrt(81 x 182 / 263 + 0.960365) / 266.841459 = 0.055461
        (81, 263, (0.255288, 0.366210)),
    ],
)
def test_the_interval_is_wilsons(count: int, total: int, interval: tuple[float, float]) -> None:
    assert Rate(count, total, 0.95).interval == pytest.approx(interval, abs=2e-6)


def test_the_interval_of_the_largest_confidence_is_finite() -> None:
    interval = Rate(5, 10, 1 - 2**-53).interval
    assert interval is not None and 0 < interval[0] < 0.2 and 0.8 < interval[1] < 1


def test_the_interval_ends_at_nothing_and_all() -> None:
    nothing, everything = Rate(0, 10, 0.95).interval, Rate(10, 10, 0.95).interval
    assert nothing is not None and everything is not None
    assert (nothing[0], everything[1]) == (0.0, 1.0)  # exactly


def test_the_confidence_widens_the_interval() -> None:
    # z = 1.281552 for 80 %: z^2 = 1.642374; half width z sqrt(2.5 + 0.410594) / 11.642374 = 0.187796
    assert Rate(5, 10, 0.8).interval == pytest.approx((0.312204, 0.687796), abs=2e-6)


def test_without_answers_there_is_no_rate() -> None:
    empty = preferences({"a": 0, "b": 0}, none=0)
    assert (empty.models["a"].rate, empty.models["a"].interval) == (None, None)
    assert (empty.pairs[0].wins.rate, empty.pairs[0].chance) == (None, 1.0)


def test_rates_are_shares_of_all_answers_and_pairs_of_decided_ones() -> None:
    rates = preferences({"sd": 2, "dpo": 6, "ours": 10}, none=2)
    assert rates.answers == 20
    assert [rate.rate for rate in rates.models.values()] == [0.1, 0.3, 0.5]
    assert rates.none.rate == 0.1
    pairs = {(pair.model, pair.other): pair for pair in rates.pairs}
    assert list(pairs) == [("sd", "dpo"), ("sd", "ours"), ("dpo", "ours")]
    assert pairs["sd", "dpo"].wins.rate == 0.25
    assert pairs["sd", "dpo"].chance == pytest.approx(2 * (1 + 8 + 28) / 2**8)  # 0, 1 or 2 of 8, on both sides
    assert pairs["sd", "ours"].wins.interval == pytest.approx(Rate(2, 12, 0.95).interval)


@pytest.mark.parametrize(("count", "total", "confidence"), [(-1, 2, 0.95), (3, 2, 0.95), (1, 2, 1.0), (1, 2, 0.0)])
def test_impossible_numbers_are_refused(count: int, total: int, confidence: float) -> None:
    with pytest.raises(InvalidInputError, match="expected 0 <= count <= total"):
        Rate(count, total, confidence)
