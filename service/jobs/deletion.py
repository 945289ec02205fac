"""Deletion of jobs and prompt sets.

A deleted job is marked, and hidden at once; collections remove its rows and objects in batches.
"""

from __future__ import annotations

from sqlalchemy.orm import Session

from service.db.queries import deletion, prompt_sets, stages
from service.db.unit_of_work import UnitOfWork
from service.errors import ConflictError, FieldProblem, InUseError, JobInUseError, NotFoundError, PromptSetInUseError
from service.states import JobState

_MAX_USERS = 20
"""Users that an error lists."""


def delete_job(uow: UnitOfWork, job_id: str, ended_by: float | None = None) -> None:
    """Delete a job with its results.

    Args:
        uow: Opens the transaction.
        job_id: The job.
        ended_by: Delete it only if it ended by this time.

    Raises:
        NotFoundError: No such job exists.
        JobInUseError: Other jobs, aliases or preference tests use its results.
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
            raise _in_use(JobInUseError, "/job_id", job.id, users)
        deletion.mark(session, job.id)

    uow.run(mark, lambda session, _: deletion.is_deleted(session, job_id))


def delete_prompt_set(uow: UnitOfWork, name_or_id: str) -> None:
    """Delete a prompt set that no job uses: all versions of a name, or the version with an id.

    Raises:
        NotFoundError: No such prompt set exists.
        PromptSetInUseError: Jobs use one of the versions.
        ConflictError: It is a built-in list.
    """

    def remove(session: Session) -> list[str]:
        versions = prompt_sets.lock(session, name_or_id)
        if any(version.builtin for version in versions):
            raise ConflictError(f"{name_or_id} is a built-in prompt list, which cannot be deleted")

        ids = [version.id for version in versions]
        users = prompt_sets.users(session, ids, _MAX_USERS + 1)
        if users:
            raise _in_use(PromptSetInUseError, "/name_or_id", name_or_id, users)
        if not any(version.name for version in versions):  # one without a name is being removed with its last job
            raise NotFoundError(f"there is no prompt set {name_or_id!r}; expected the name or id of a prompt set")

        prompt_sets.forget_names(session, ids)
        prompt_sets.remove_unused(session, ids)
        return ids

    uow.run(remove, lambda session, ids: not prompt_sets.any_named(session, ids))


def _in_use(error: type[InUseError], pointer: str, name: str, users: list[str]) -> InUseError:
    listed = users[:_MAX_USERS]
    more = " and others" if len(users) > len(listed) else ""
    message = f"{name} is used by {', '.join(listed)}{more}: delete these first"
    return error(message, *(FieldProblem(pointer, f"used by {user}") for user in listed))
