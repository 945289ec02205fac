"""Queries of verdicts: each reviewer's own ones, and the combined verdict that a pair stores."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import ColumnElement, func, select, text
from sqlalchemy.orm import Session

from service.db.queries import jobs
from service.db.queries.rows import is_any_of
from service.db.tables import WITHOUT_VERDICT, Pair, PairVerdict
from service.errors import ConflictError
from service.states import Verdict
from service.verdicts import combine

MAX_REVIEWERS = 100
"""The most reviewers of a pair. Without API keys, the name of a reviewer is any text."""


def of_pairs(session: Session, pair_ids: Iterable[str]) -> dict[str, list[PairVerdict]]:
    """The verdicts on these pairs, oldest first, by pair."""
    by_pair: dict[str, list[PairVerdict]] = {pair_id: [] for pair_id in pair_ids}
    query = select(PairVerdict).where(is_any_of(PairVerdict.pair_id, by_pair), PairVerdict.prefer.is_not(None))
    for row in session.scalars(query.order_by(PairVerdict.created_at, PairVerdict.reviewer)):
        by_pair[row.pair_id].append(row)
    return by_pair


def own_revision(session: Session, pair: Pair, reviewer: str | None) -> int:
    """The revision of the pair that the last change of this reviewer's verdict made; 0 if there was none."""
    own = session.get(PairVerdict, (pair.id, reviewer or ""))
    return 0 if own is None else own.revision


def give(session: Session, pair: Pair, verdict: Verdict | None, reviewer: str | None) -> None:
    """Set or remove the verdict of a reviewer, and combine all verdicts on the pair, whose row must be locked.

    Raises:
        ConflictError: The pair has as many reviewers as it may have.
    """
    # 1. a verdict that a process of version 0.1.0 has given during an upgrade
    if pair.verdict is not None and pair.verdict_at is not None and pair.reviewers == 0:
        _set(session, pair, Verdict(pair.verdict), pair.verdict_by, pair.verdict_at)

    # 2. the verdict
    pair.revision += 1
    _set(session, pair, verdict, reviewer, jobs.now(session))

    # 3. the combined verdict
    verdicts = of_pairs(session, [pair.id])[pair.id]
    pair.verdict = combine(Verdict(row.prefer) for row in verdicts if row.prefer is not None)
    pair.verdict_by = (verdicts[0].reviewer or None) if len(verdicts) == 1 else None
    pair.verdict_at = verdicts[-1].created_at if verdicts else None
    pair.reviewers = len(verdicts)
    session.flush()


def _set(session: Session, pair: Pair, verdict: Verdict | None, reviewer: str | None, at: float) -> None:
    row = session.get(PairVerdict, (pair.id, reviewer or ""))
    if row is None:
        of_pair = select(func.count()).select_from(PairVerdict).where(PairVerdict.pair_id == pair.id)
        if (session.scalar(of_pair) or 0) >= MAX_REVIEWERS:
            raise ConflictError(f"{pair.id} has {MAX_REVIEWERS} reviewers, the most that a pair can have")
        row = PairVerdict(pair_id=pair.id, reviewer=reviewer or "")
        session.add(row)

    row.prefer = verdict
    row.revision = pair.revision
    row.created_at = at
    session.flush()


def is_judged_by(reviewer: str | None) -> ColumnElement[bool]:
    """The pair has a verdict of this reviewer."""
    own = select(PairVerdict.pair_id).where(
        PairVerdict.pair_id == Pair.id, PairVerdict.reviewer == (reviewer or ""), PairVerdict.prefer.is_not(None)
    )
    # a scalar subquery, because PostgreSQL may read all verdicts of the reviewer for EXISTS
    return own.scalar_subquery().is_not(None)


def any_missing(session: Session, job_id: str) -> bool:
    """Whether a pair in the last round of the job has no verdict, but its review waits for one."""
    query = select(Pair.id).where(*_in_review(job_id), text(WITHOUT_VERDICT))
    return session.scalar(query.limit(1)) is not None


@dataclass(frozen=True)
class ReviewProgress:
    """The pairs of a round that its review waits for: their number, and that of those with a verdict."""

    round: int
    pairs: int
    judged: int


def review_progress(session: Session, job_id: str) -> ReviewProgress | None:
    """The progress of the review of the job's last round; None without pairs."""
    query = select(Pair.round, func.count(), func.count(Pair.verdict)).where(*_in_review(job_id)).group_by(Pair.round)
    row = session.execute(query).first()
    return None if row is None else ReviewProgress(*row)


def _in_review(job_id: str) -> tuple[ColumnElement[bool], ...]:
    """The conditions for the pairs in the last round of the job that its review waits for."""
    newest = select(func.max(Pair.round)).where(Pair.job_id == job_id).scalar_subquery()
    return Pair.job_id == job_id, Pair.round == newest, ~Pair.review_exempt
