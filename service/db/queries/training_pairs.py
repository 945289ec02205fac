"""The pairs of a training request, as its check and the worker select them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sqlalchemy.orm import Session

from service.db.queries import results
from service.db.tables import Pair
from service.states import Verdict

_PREFERRING = frozenset({Verdict.TARGET, Verdict.BASE})


def named(session: Session, pair_ids: Sequence[str], job_ids: Sequence[str]) -> list[Pair]:
    """The pairs with these ids, then the pairs of these jobs whose targets are verified.

    Both follow the order of the arguments. A pair that is named twice occurs twice; unknown ids are left out.
    """
    pairs = results.pairs(session, pair_ids)
    for job_id in job_ids:
        pairs += results.job_pairs(session, job_id)
    return pairs


def with_preferred_side(pairs: Iterable[Pair]) -> list[Pair]:
    """The pairs with a verdict that prefers the target or the base."""
    return [pair for pair in pairs if pair.verdict in _PREFERRING]
