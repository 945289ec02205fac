"""Queries over previews: small images of samples, which go with them."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.db.queries.rows import is_any_of, is_kept, select_by_ids
from service.db.tables import Job, JobSource, Pair, Preview
from service.states import FINAL_JOB_STATES, JobKind

_MAX_UNFINISHED = 200
"""Unfinished preview jobs that are compared with a request."""


def of_samples(session: Session, sample_ids: Iterable[str]) -> dict[str, list[Preview]]:
    """The previews of these samples by sample, newest first."""
    by_sample: dict[str, list[Preview]] = {sample_id: [] for sample_id in sample_ids}
    for row in select_by_ids(session, Preview, Preview.sample_id, by_sample, Preview.job_id.desc()):
        by_sample[row.sample_id].append(row)
    return by_sample


def newest_fused(session: Session, reference_ids: Collection[str]) -> list[Pair]:
    """For each of these samples, the newest pair with a target whose reference it is."""
    fused = (is_any_of(Pair.reference_id, reference_ids), Pair.target_id.is_not(None), is_kept(Pair))
    newest = select(func.max(Pair.id)).where(*fused).group_by(Pair.reference_id)
    return list(session.scalars(select(Pair).where(Pair.id.in_(newest))))


def unfinished(session: Session, source_ids: Collection[str]) -> list[Job]:
    """The first preview jobs that have not ended and that use one of these jobs."""
    using = select(JobSource.job_id).where(is_any_of(JobSource.source_id, source_ids))
    has_not_ended = Job.state.not_in(FINAL_JOB_STATES)
    query = select(Job).where(Job.id.in_(using), Job.kind == JobKind.PREVIEW, has_not_ended, is_kept(Job))
    return list(session.scalars(query.order_by(Job.id).limit(_MAX_UNFINISHED)))
