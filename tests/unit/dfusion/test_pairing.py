import math

import pytest

from dfusion.config import PairingConfig
from dfusion.errors import NonFiniteError
from dfusion.pairing import ChosenPair, adopt, choose_pairs


def test_best_quarter_twice_against_the_worst_half() -> None:
    """Eight samples, ranked 7 3 | 0 5 | 1 2 6 4: two references, four bases, worst first."""
    scores = [0.6, 0.4, 0.3, 0.8, 0.0, 0.5, 0.2, 0.9]
    assert choose_pairs(scores) == [ChosenPair(7, 4), ChosenPair(3, 6), ChosenPair(7, 2), ChosenPair(3, 1)]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, []),
        (1, []),
        (2, [ChosenPair(1, 0)]),
        (3, [ChosenPair(2, 0)]),
        (4, [ChosenPair(3, 0), ChosenPair(3, 1)]),
        (5, [ChosenPair(4, 0), ChosenPair(4, 1)]),
        (7, [ChosenPair(6, 0), ChosenPair(6, 1)]),
    ],
)
def test_any_number_of_samples_is_paired(count: int, expected: list[ChosenPair]) -> None:
    assert choose_pairs([float(i) for i in range(count)]) == expected


def test_equal_scores_make_no_pair() -> None:
    assert choose_pairs([0.5] * 8) == []
    assert choose_pairs([0.5, 0.5, 0.5, 0.4]) == [ChosenPair(0, 3)]  # the second base, place 2, scores as the reference


def test_uses_and_shares_are_settings() -> None:
    config = PairingConfig(reference_share=0.25, reference_uses=1, base_share=0.25)
    assert choose_pairs([1, 2, 3, 4, 5, 6, 7, 8], config) == [ChosenPair(7, 0), ChosenPair(6, 1)]


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


def test_rank_order_deals_as_the_released_code() -> None:
    """Written as in the released code: order[:n/4] each twice, against order[n/2:], both from the best down."""
    scores = [0.6, 0.4, 0.3, 0.8, 0.0, 0.5, 0.2, 0.9]
    order = [7, 3, 0, 5, 1, 2, 6, 4]
    released = list(zip([i for i in order[:2] for _ in range(2)], order[4:], strict=True))
    pairs = choose_pairs(scores, PairingConfig.released_code())
    assert [(pair.reference, pair.base) for pair in pairs] == released == [(7, 1), (7, 2), (3, 6), (3, 4)]


def test_rank_order_uses_the_worst_share_even_with_unused_bases() -> None:
    """7 samples: one reference with 2 uses, bases 2, 1, 0 from the best down; the worst is unused."""
    config = PairingConfig(dealing="rank_order")
    assert choose_pairs([float(i) for i in range(7)], config) == [ChosenPair(6, 2), ChosenPair(6, 1)]


def test_the_released_code_keeps_every_target() -> None:
    assert adopt(-0.5, 0.5, 0.9, PairingConfig.released_code()) and adopt(
        -0.5, -0.1, 0.9, PairingConfig.released_code()
    )
    assert not adopt(-0.5, -0.1, 0.9)
