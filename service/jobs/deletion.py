"""Deletion of jobs. A deleted job is marked, and hidden at once; collections remove its rows and objects in batches."""

from __future__ import annotations

from sqlalchemy.orm import Session

from service.db.queries import deletion, stages
from service.db.unit_of_work import UnitOfWork
from service.errors import ConflictError, FieldProblem, JobInUseError
from service.states import JobState

_MAX_USERS = 20
"""Users of a job that an error lists."""


def delete_job(uow: UnitOfWork, job_id: str, ended_by: float | None = None) -> None:
    """Delete a job with its results.

    Args:
        uow: Opens the transaction.
        job_id: The job.
        ended_by: Delete it only if it ended by this time.

    Raises:
        NotFoundError: No such job exists.
        JobInUseError: Other jobs use its samples, pairs or models, or aliases refer to its models.
        ConflictError: The job has not ended, its last stages are still stopping, or it ended after `ended_by`.
    """

    def mark(session: Session) -> None:
        job = deletion.lock(session, job_id)
        if not JobState(job.state).is_final:
            raise ConflictError(f"{job.id} is {job.state}: only a job that has ended can be deleted; cancel it first")
        if stages.states_left(session, job.id):
            raise ConflictError(f"{job.id} still has a running stage, which is stopping: try again in a moment")
        if ended_by is not None and (job.finished_at is None or job.finished_at > ended_by):
            raise ConflictError(f"{job.id} ended later")

        users = deletion.users(session, job.id, _MAX_USERS + 1)
        if users:
            raise _in_use(job.id, users)
        deletion.mark(session, job.id)

    uow.run(mark, lambda session, _: deletion.is_deleted(session, job_id))


def _in_use(job_id: str, users: list[str]) -> JobInUseError:
    listed = users[:_MAX_USERS]
    more = " and others" if len(users) > len(listed) else ""
    message = f"{job_id} is used by {', '.join(listed)}{more}: delete these first"
    return JobInUseError(message, *(FieldProblem("/job_id", f"used by {user}") for user in listed))
