"""Which pairs a request to train names, for its check and for the worker alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sqlalchemy.orm import Session

from service.db.queries import results
from service.db.tables import Pair
from service.states import Verdict

_PREFERS_A_SIDE = frozenset({Verdict.TARGET, Verdict.BASE})


def named(session: Session, pair_ids: Sequence[str], job_ids: Sequence[str]) -> list[Pair]:
    """The pairs of these ids, then all pairs of these jobs whose targets are verified.

    Both in the order in which they are named; a pair that is named twice is there twice, an unknown id is left out.
    """
    pairs = results.pairs(session, pair_ids)
    for job_id in job_ids:
        pairs += results.job_pairs(session, job_id)
    return pairs


def with_preferred_side(pairs: Iterable[Pair]) -> list[Pair]:
    """Those of these pairs of which a person prefers the target or the base."""
    return [pair for pair in pairs if pair.verdict in _PREFERS_A_SIDE]
