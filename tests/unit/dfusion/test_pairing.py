import math

import pytest

from dfusion.config import PairingConfig
from dfusion.errors import NonFiniteError
from dfusion.pairing import Pair, adopt, choose_pairs


def test_best_quarter_twice_against_the_worst_half() -> None:
    """Eight samples, ranked 7 3 | 0 5 | 1 2 6 4: two references, four bases, worst first."""
    scores = [0.6, 0.4, 0.3, 0.8, 0.0, 0.5, 0.2, 0.9]
    assert choose_pairs(scores) == [Pair(7, 4), Pair(3, 6), Pair(7, 2), Pair(3, 1)]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, []),
        (1, []),
        (2, [Pair(1, 0)]),
        (3, [Pair(2, 0)]),
        (4, [Pair(3, 0), Pair(3, 1)]),
        (5, [Pair(4, 0), Pair(4, 1)]),
        (7, [Pair(6, 0), Pair(6, 1)]),
    ],
)
def test_any_count(count: int, expected: list[Pair]) -> None:
    assert choose_pairs([float(i) for i in range(count)]) == expected


def test_equal_scores_make_no_pair() -> None:
    assert choose_pairs([0.5] * 8) == []
    assert choose_pairs([0.5, 0.5, 0.5, 0.4]) == [Pair(0, 3)]  # the second base, place 2, scores as the reference


def test_uses_and_shares_are_settings() -> None:
    config = PairingConfig(reference_share=0.25, reference_uses=1, base_share=0.25)
    assert choose_pairs([1, 2, 3, 4, 5, 6, 7, 8], config) == [Pair(7, 0), Pair(6, 1)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_must_be_finite(bad: float) -> None:
    with pytest.raises(NonFiniteError, match=r"\[1\]"):
        choose_pairs([0.1, bad])
    with pytest.raises(NonFiniteError):
        adopt(bad, 0.1, 0.2)


def test_adoption() -> None:
    assert adopt(0.5, 0.5, 0.9) and not adopt(0.49, 0.5, 0.9)
    against_reference = PairingConfig(adoption_against="reference", adoption_threshold=0.5)
    assert adopt(0.45, 0.5, 0.9, against_reference) and not adopt(0.44, 0.0, 0.9, against_reference)
