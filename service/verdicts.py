"""What several verdicts on a pair mean together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

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


def krippendorff_alpha(disagreement: float, counts: Collection[int]) -> float | None:
    """The agreement of reviewers: Krippendorff's alpha for nominal data, in which verdicts may be missing.

    alpha = 1 - D_o / D_e (Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011), with

        D_o = 1/n * sum over pairs and choices of m_c (m - m_c) / (m - 1)    the observed disagreement
        D_e = (n^2 - sum over choices of n_c^2) / (n (n - 1))                that of verdicts by chance

    Args:
        disagreement: n D_o, where a pair has m >= 2 verdicts, m_c of them for the choice c.
        counts: n_c, the verdicts of all such pairs for each choice. Their sum is n.

    Returns:
        1 for perfect agreement, 0 for that of chance. None if all verdicts are the same or there are none, since
        chance then agrees as well.
    """
    total = sum(counts)
    differing = total**2 - sum(count**2 for count in counts)
    return 1 - (total - 1) * disagreement / differing if differing else None
