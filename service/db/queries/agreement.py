"""How well reviewers agree: aggregates over the verdicts of pairs."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import CTE, Double, case, cast, func, select, text
from sqlalchemy.orm import Session

from service.db.queries.rows import is_kept
from service.db.tables import IS_JUDGED, Pair, PairVerdict
from service.verdicts import krippendorff_alpha

MAX_PAIRS = 10_000
"""The most pairs that are compared: the newest ones, so that the cost is bounded."""
MAX_LISTED = 100
"""The most reviewers that are listed: those with the most verdicts."""


@dataclass(frozen=True)
class ReviewerCounts:
    """The verdicts of a reviewer.

    Attributes:
        reviewer: The name; "" if none was given.
        judged: The number of verdicts.
        gold_judged: The number of those on gold pairs.
        gold_right: The number of those that are the expected ones.
    """

    reviewer: str
    judged: int
    gold_judged: int
    gold_right: int


@dataclass(frozen=True)
class Agreement:
    """The agreement of reviewers.

    Attributes:
        pairs: The number of pairs with a verdict, at most MAX_PAIRS.
        compared: The number of those that several reviewers have judged.
        verdicts: The number of verdicts on the compared pairs.
        alpha: Krippendorff's alpha of these; None if it is undefined.
        reviewers: The reviewers with the most verdicts.
    """

    pairs: int
    compared: int
    verdicts: int
    alpha: float | None
    reviewers: list[ReviewerCounts]


def measure(session: Session, job_id: str | None = None, prompt_set_id: str | None = None) -> Agreement:
    """Measure the agreement on the newest pairs with a verdict: of a job, of a prompt set, or of all pairs."""
    # 1. the pairs, of which `reviewers` is m
    newest = select(Pair.id, Pair.gold, Pair.reviewers).where(text(IS_JUDGED), is_kept(Pair))
    if job_id is not None:
        newest = newest.where(Pair.job_id == job_id)
    if prompt_set_id is not None:
        newest = newest.where(Pair.prompt_set_id == prompt_set_id)
    judged = newest.order_by(Pair.id.desc()).limit(MAX_PAIRS).cte("judged")
    is_compared = case((judged.c.reviewers > 1, 1), else_=0)
    pairs, compared = session.execute(select(func.count(), func.sum(is_compared)).select_from(judged)).one()

    # 2. m_c of those that several reviewers have judged, and by choice n_c and the sum of m_c (m - m_c) / (m - 1)
    of_pair = func.count()
    by_choice = (
        select(PairVerdict.prefer, judged.c.reviewers.label("of_all"), of_pair.label("same"))
        .join(judged, judged.c.id == PairVerdict.pair_id)
        .where(PairVerdict.prefer.is_not(None), judged.c.reviewers > 1)
        .group_by(PairVerdict.pair_id, PairVerdict.prefer, judged.c.reviewers)
        .subquery()
    )
    differing = cast(by_choice.c.same * (by_choice.c.of_all - by_choice.c.same), Double) / (by_choice.c.of_all - 1)
    sums = select(func.sum(by_choice.c.same), func.sum(differing)).group_by(by_choice.c.prefer)
    rows = session.execute(sums).all()

    counts = [int(count) for count, _ in rows]
    alpha = krippendorff_alpha(sum(float(disagreement) for _, disagreement in rows), counts)
    return Agreement(pairs, int(compared or 0), sum(counts), alpha, _by_reviewer(session, judged))


def _by_reviewer(session: Session, judged: CTE) -> list[ReviewerCounts]:
    """The reviewers of these pairs with the most verdicts."""
    is_right = case((PairVerdict.prefer == judged.c.gold, 1), else_=0)
    query = (
        select(PairVerdict.reviewer, func.count(), func.count(judged.c.gold), func.sum(is_right))
        .join(judged, judged.c.id == PairVerdict.pair_id)
        .where(PairVerdict.prefer.is_not(None))
        .group_by(PairVerdict.reviewer)
        .order_by(func.count().desc(), PairVerdict.reviewer)
        .limit(MAX_LISTED)
    )
    return [ReviewerCounts(name, total, gold, int(right)) for name, total, gold, right in session.execute(query)]
