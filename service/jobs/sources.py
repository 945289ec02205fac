"""The jobs that a job uses: whose samples, pairs or models it names, and whose stored trajectories it may read."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from service.db.queries import collection, jobs
from service.db.tables import Job
from service.ids import ids_in
from service.jobs.kinds import KINDS, spec_of
from service.jobs.kinds.base import Checked
from service.states import JobKind

_TEXTS = frozenset({"label", "prompts"})
"""Fields of requests with texts of people, in which an id is no reference."""
TRAJECTORY_READERS = frozenset(kind.name for kind in KINDS.values() if kind.reads is not None)
"""Kinds whose jobs may read stored trajectories of other jobs."""


def used_jobs(session: Session, checked: Checked[Any]) -> set[str]:
    """The jobs whose samples, pairs or models a request names.

    A job that trains on pairs uses the job of the pairs, not those of their samples, which that job uses itself.

    Args:
        session: A view of the database.
        checked: The checked request.
    """
    ids = ids_in(checked.spec.model_dump_json(exclude=_TEXTS)) | set(checked.sizes.models)
    owners: set[str] = set()
    if checked.model is not None:
        owners |= {checked.model.job_id} if checked.model.job_id is not None else set()
        ids.discard(checked.model.id)
    return owners | jobs.owners(session, ids)


def trajectory_sources(session: Session, job_id: str) -> set[str]:
    """The jobs whose stored trajectories this job may read, without itself.

    The number of rows read is bounded by the number of ids in this request and, in turn, in those of the jobs that it
    names.

    Args:
        session: A view of the database.
        job_id: The job.
    """
    return _sources(session, jobs.get(session, job_id))


def _sources(session: Session, job: Job) -> set[str]:
    kind = KINDS[JobKind(job.kind)]
    if kind.reads is None:
        return set()

    # 1. the jobs that sampled what it names
    read = kind.reads(spec_of(job.kind, job.spec))
    sources = collection.jobs_of_samples(session, read.samples) if read.samples else set()
    if read.pairs:
        sources |= collection.jobs_of_pairs(session, read.pairs)

    # 2. the jobs that it names, which are older, and what those read
    named = jobs.by_ids(session, read.jobs) if read.jobs else {}
    return sources.union(named, *[_sources(session, job) for job in named.values()])
