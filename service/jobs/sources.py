"""The jobs whose stored trajectories a job may read."""

from __future__ import annotations

from sqlalchemy.orm import Session

from service.db.queries import collection, jobs
from service.jobs.kinds import FusionJobSpec, JobSpec, TrainingJobSpec, spec_of
from service.states import JobKind


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

        case TrainingJobSpec(pairs=pairs) if pairs is not None:
            return collection.jobs_of_pairs(session, pairs)

        case TrainingJobSpec(jobs=job_ids):
            named = jobs.by_ids(session, job_ids or ())
            fusions = [job.spec for job in named.values() if job.kind == JobKind.FUSION]
            nested = [_sources(session, spec_of(JobKind.FUSION, fusion)) for fusion in fusions]
            return set(named).union(*nested)

        case _:
            return set()
