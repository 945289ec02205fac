import math
from collections.abc import Callable

import pytest

from dfusion.advantages import RewardHistory
from dfusion.attention.layers import resolve_layers
from dfusion.attention.masks import normalise_items
from dfusion.errors import DFusionError, shortened
from dfusion.pairing import choose_pairs
from dfusion.prompts import Prompt
from dfusion.rewards.checks import checked_scores


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([1, 2], "[1, 2]"),
        ("a cat", "'a cat'"),
        (None, "None"),
        ([0] * 6, "[0, 0, 0, 0, 0, 0]"),
        (list(range(40)), "list of length 40: [0, 1, 2, 3, 4, 5, ...]"),
        (("x" * 100,), "tuple of length 1: ('xxxxxxxxxxxx...xxxxxxxxxxxxx',)"),
    ],
)
def test_a_short_value_is_shown_in_full_and_a_long_one_by_type_length_and_beginning(
    value: object, expected: str
) -> None:
    assert shortened(value) == expected


def test_long_objects_in_a_long_sequence_are_cut() -> None:
    prompts = tuple(Prompt(text=f"a [cat] number {n}") for n in range(40))
    assert shortened(prompts).startswith("tuple of length 40: (Prompt(") and len(shortened(prompts)) < 250


@pytest.mark.parametrize(
    "call",
    [
        lambda: normalise_items([[9] * 1000], 5),
        lambda: normalise_items([["x" * 1000]], 5),  # type: ignore[list-item]
        lambda: RewardHistory({"a cat": (1.0,)}).advantages("a cat", [math.nan] * 1000),
        lambda: RewardHistory().extended({"a cat": [math.nan] * 1000}),
        lambda: choose_pairs([math.inf] * 1000),
        lambda: resolve_layers([], range(1000)),
        lambda: checked_scores("mine", [[1.0] * 1000], ["a"]),
    ],
)
def test_messages_of_invalid_sequences_are_bounded(call: Callable[[], object]) -> None:
    with pytest.raises(DFusionError) as caught:
        call()
    assert len(str(caught.value)) < 250
