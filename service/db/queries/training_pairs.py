"""The pairs of a training request, as its check and the worker select them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, func, literal, select, union
from sqlalchemy.orm import Session

from service.db.queries import results
from service.db.queries.rows import is_any_of, is_kept
from service.db.tables import Job, Pair, Sample
from service.states import Verdict

_PREFERRING = frozenset({Verdict.TARGET, Verdict.BASE})


@dataclass(frozen=True)
class Side:
    """What samples of some pairs have in common.

    Attributes:
        is_base: Whether they are bases.
        is_target: Whether they are targets.
        model_id: The model that sampled them.
        job_id: The job that sampled them.
        has_trajectory: Whether their trajectories are stored.
    """

    is_base: bool
    is_target: bool
    model_id: str
    job_id: str
    has_trajectory: bool


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


def are_verified(session: Session, pair_ids: Collection[str]) -> dict[str, bool]:
    """Whether the targets of these pairs are verified, by pair. Unknown ids are left out."""
    query = select(Pair.id, Pair.adopted.is_not(None).label("verified")).where(
        is_any_of(Pair.id, pair_ids), is_kept(Pair)
    )
    return {row.id: row.verified for row in session.execute(query)}


def jobs_with_pairs(session: Session, job_ids: Collection[str]) -> set[str]:
    """Those of these jobs that have pairs whose targets are verified."""
    has_pair = select(Pair.id).where(Pair.job_id == Job.id, Pair.adopted.is_not(None)).exists()
    return set(session.scalars(select(Job.id).where(is_any_of(Job.id, job_ids), has_pair)))


def selected(pair_ids: Collection[str], job_ids: Collection[str], only_preferred: bool) -> ColumnElement[bool]:
    """The condition for the pairs that `named` returns, and that `with_preferred_side` keeps if `only_preferred`."""
    of_jobs = is_any_of(Pair.job_id, job_ids) & Pair.adopted.is_not(None)
    condition = is_any_of(Pair.id, pair_ids) if pair_ids else of_jobs
    return condition & Pair.verdict.in_(_PREFERRING) if only_preferred else condition


def count(session: Session, condition: ColumnElement[bool], limit: int) -> int:
    """The number of pairs for which the condition holds, counted up to `limit`."""
    counted = select(Pair.id).where(condition).limit(limit).subquery()
    return session.scalar(select(func.count()).select_from(counted)) or 0


def sides(session: Session, condition: ColumnElement[bool]) -> list[Side]:
    """The samples of these pairs, as far as they differ: few rows for any number of pairs."""
    queries = [
        select(
            literal(column is Pair.base_id),
            literal(column is Pair.target_id),
            Sample.model_id,
            Sample.job_id,
            Sample.trajectory_artifact_id.is_not(None),
        )
        .join(Pair, column == Sample.id)
        .where(condition)
        for column in (Pair.reference_id, Pair.base_id, Pair.target_id)
    ]
    return [Side(*row) for row in session.execute(union(*queries))]
