"""Verdicts of several reviewers on one pair."""

from __future__ import annotations

from itertools import permutations

import pytest

from service.states import Verdict
from service.verdicts import combine

TARGET, BASE, TIE, REJECT = Verdict.TARGET, Verdict.BASE, Verdict.TIE, Verdict.REJECT


@pytest.mark.parametrize(
    ("verdicts", "combined"),
    [
        ([], None),
        ([BASE], BASE),
        ([TARGET, TARGET, BASE], TARGET),
        ([TARGET, TARGET, BASE, REJECT], TARGET),  # most reviewers, though not more than half of them
        ([TARGET, BASE], TIE),
        ([REJECT, TARGET], TIE),
        ([TARGET, TARGET, BASE, BASE, REJECT], TIE),
        ([REJECT, REJECT, TIE], REJECT),
    ],
)
def test_verdicts_are_combined_in_any_order(verdicts: list[Verdict], combined: Verdict | None) -> None:
    assert {combine(order) for order in permutations(verdicts)} == {combined}
