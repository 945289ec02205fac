"""What several verdicts on a pair mean together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from service.states import Verdict


def combine(verdicts: Iterable[Verdict]) -> Verdict | None:
    """Combine the verdicts of all reviewers of a pair.

    Args:
        verdicts: One verdict of each reviewer.

    Returns:
        The verdict that most of them gave. A tie if several verdicts were given equally often; None without verdicts.
    """
    [*most_frequent] = Counter(verdicts).most_common(2)
    if not most_frequent:
        return None

    (first, count), *others = most_frequent
    is_undecided = any(other_count == count for _, other_count in others)
    return Verdict.TIE if is_undecided else first
