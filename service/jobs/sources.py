"""The jobs that a job uses: whose samples, pairs or models it names, and whose stored trajectories it may read."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from service.db.queries import collection, jobs
from service.ids import ids_in
from service.jobs.kinds import FusionJobSpec, JobSpec, PreviewJobSpec, TrainingJobSpec, spec_of
from service.jobs.kinds.base import Checked
from service.states import JobKind

_TEXTS = frozenset({"label", "prompts"})
"""Fields of requests with texts of people, in which an id is no reference."""


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

    The number of rows read is bounded by the number of ids that a request may have. So for a training on all pairs of
    a job, the pairs are not read: their samples are those of that job, and of the sources of its fusion.

    Args:
        session: A view of the database.
        job_id: The job.
    """
    job = jobs.get(session, job_id)
    return _sources(session, spec_of(job.kind, job.spec))


def _sources(session: Session, spec: JobSpec) -> set[str]:
    match spec:
        case FusionJobSpec(sampling=str(sampling)):
            return {sampling}

        case FusionJobSpec(pair=str(pair)):
            return collection.jobs_of_pairs(session, [pair])

        case FusionJobSpec(pairs=pairs):
            sides = pairs or ()
            return collection.jobs_of_samples(
                session, {side.reference for side in sides} | {side.base for side in sides}
            )

        case PreviewJobSpec(pair=str(pair)):
            return collection.jobs_of_pairs(session, [pair])

        case PreviewJobSpec(samples=samples):
            return collection.jobs_of_samples(session, samples or ())

        case TrainingJobSpec(pairs=pairs) if pairs is not None:
            return collection.jobs_of_pairs(session, pairs)

        case TrainingJobSpec(jobs=job_ids):
            named = jobs.by_ids(session, job_ids or ())
            fusions = [job.spec for job in named.values() if job.kind == JobKind.FUSION]
            nested = [_sources(session, spec_of(JobKind.FUSION, fusion)) for fusion in fusions]
            return set(named).union(*nested)

        case _:
            return set()
