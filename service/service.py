"""The operations that the service offers: create, estimate, control, retry and extend jobs, and give verdicts."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session

from dfusion.prompts import Prompt, builtin_lists
from service.catalogue import Catalogue
from service.db.clock import clock_problem
from service.db.locks import AdvisoryLock, hold
from service.db.migrate import migrate, require_newest
from service.db.queries import jobs, prompt_sets, results, stages, verdicts
from service.db.tables import Job, Pair, PromptSet
from service.db.unit_of_work import API_POOL, Pool, UnitOfWork, first_line, repeatable
from service.errors import (
    ConflictError,
    IdempotencyError,
    InvalidRequestError,
    PreconditionError,
    SourceDeletedError,
    StartError,
)
from service.jobs import deletion, execution, extension, limits
from service.jobs.checking import check, unknown_model
from service.jobs.estimates import ResourceEstimate, estimate_of
from service.jobs.kinds import JobSpec, PreviewJobSpec, kind_of, spec_of
from service.jobs.kinds.base import Checked
from service.jobs.kinds.rounds import StopWhen
from service.jobs.planning import count, plan_start, rounds_of, total_work
from service.jobs.previews import job_with_previews
from service.jobs.sources import used_jobs
from service.plan import PlannedStage, WorkCounts
from service.queue import Queue
from service.settings import Settings
from service.states import JobState, Verdict
from service.storage import Store, open_store

T = TypeVar("T")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Service:
    """An installation: its settings, database, store and catalogue."""

    settings: Settings
    uow: UnitOfWork
    store: Store
    catalogue: Catalogue

    @classmethod
    def open(
        cls, settings: Settings, queue: Queue | None = None, migrates: bool = True, pool: Pool = API_POOL
    ) -> Service:
        """Open the installation.

        Args:
            settings: The settings of the installation.
            queue: Delivers hints to workers; None drops them.
            migrates: Migrate the database if needed. Workers and sweepers do not, so that an old one cannot be started
                on a database and change it.
            pool: The connections to PostgreSQL.

        Raises:
            StartError: The data folder, the database or the S3 bucket cannot be used, the database is not migrated, or
                a model of the settings has an unknown scorer. The message names the setting.
        """
        with _named_in_errors(settings):
            return cls._open(settings, queue, migrates, pool)

    @classmethod
    def _open(cls, settings: Settings, queue: Queue | None, migrates: bool, pool: Pool) -> Service:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        _require_health_folder(settings)
        uow = UnitOfWork.connect(settings.database, queue, pool)
        try:
            catalogue = Catalogue.of(settings)
            if migrates:
                migrate(uow.engine, settings.data_dir / "migrate.lock")
            else:
                require_newest(uow.engine)

            with uow.writing() as session:
                hold(session, AdvisoryLock.CATALOGUE)
                prompt_sets.ensure_builtin(session, builtin_lists().values())
                results.ensure_base_models(session, catalogue.models)
                skew = clock_problem(session)
            if skew is not None:
                _logger.warning("%s", skew)
            return cls(settings, uow, open_store(settings), catalogue)
        except BaseException:
            uow.engine.dispose()  # a worker tries again and again, and each attempt would leave a connection
            raise

    def close(self) -> None:
        """Close the connections to the database and the broker."""
        self.uow.close()


def _require_health_folder(settings: Settings) -> None:
    """Raise StartError if the health file cannot be written."""
    folder = Path(settings.health_file).parent
    if settings.health_file and not os.access(folder, os.W_OK | os.X_OK):
        raise StartError(f"DFUSION_HEALTH_FILE: expected a file in a writable folder, got {folder}")


@contextmanager
def _named_in_errors(settings: Settings) -> Iterator[None]:
    """Raises StartError that names the setting for errors of the data folder and of the database."""
    try:
        yield
    except OSError as error:
        raise StartError(f"DFUSION_DATA_DIR: {settings.data_dir}: {error.strerror or error}") from error
    except (DBAPIError, PoolTimeoutError) as error:
        raise StartError(f"DFUSION_DATABASE_URL: {first_line(error)}") from error


def estimate_job(service: Service, spec: JobSpec) -> tuple[WorkCounts, ResourceEstimate, list[dict[str, Any]]]:
    """The work, the resources and the prompts of a job, which is not created.

    Raises:
        InvalidRequestError: As `create_job` does.
    """
    with service.uow.reading() as session:
        checked = check(service.catalogue, service.settings, session, spec)
        rows = [row for row in (checked.prompt_set, checked.new_set, checked.held_out_set) if row is not None]
        sets = {row.id: row for row in rows}
        sets |= prompt_sets.by_ids(session, checked.prompt_set_ids - sets.keys())
        prompts = [prompt for row in sets.values() for prompt in row.prompts]
        return count(checked.spec, checked.sizes), estimate_of(session, checked), prompts


def create_job(
    service: Service, spec: JobSpec, key: str | None = None, api_key_id: str | None = None, origin_id: str | None = None
) -> str:
    """Create a job with its first stages.

    Args:
        service: The installation.
        spec: The request.
        key: The Idempotency-Key of the request.
        api_key_id: The API key of the caller.
        origin_id: The job that this one retries.

    Returns:
        The id of the new job, or of the job that the same request with the same `key` created before.

    Raises:
        InvalidRequestError: The request cannot be fulfilled; lists all problems.
        IdempotencyError: The key was used with another request.
        OverloadError: Too many jobs are queued, or the disk is almost full.
    """
    return create_and_read(service, spec, lambda _session, job_id: job_id, key, api_key_id, origin_id)


def create_and_read(
    service: Service,
    spec: JobSpec,
    read: Callable[[Session, str], T],
    key: str | None = None,
    api_key_id: str | None = None,
    origin_id: str | None = None,
) -> T:
    """Create a job as `create_job` does and return `read(session, job_id)`.

    The request is checked in a separate read transaction, so that a large one does not hold up other writers. A new job
    is read in the transaction that creates it, which saves one; an existing job in a separate transaction.
    """
    request = _Request(spec, _stored_key(key, api_key_id), api_key_id, origin_id)

    def create(session: Session) -> tuple[str, list[T]]:
        job_id, is_new = _create(service, session, request, new)
        return job_id, [read(session, job_id)] if is_new else []

    def is_created(session: Session, created: tuple[str, list[T]]) -> bool:
        return jobs.exists(session, created[0])

    new = _check(service, request)
    try:
        job_id, views = service.uow.run(create, is_created)
    except (IntegrityError, SourceDeletedError):
        # a concurrent request with the same key, whose job is found now; or a row that the request names was removed
        # after the check, which now says so
        new = _check(service, request)
        job_id, views = service.uow.run(create, is_created)
    if views:
        return views[0]

    with service.uow.reading() as session:
        return read(session, job_id)


@dataclass(frozen=True)
class _Request:
    """A request for a job.

    Attributes:
        spec: Its body.
        key: Its Idempotency-Key, as it is stored.
        api_key_id: The API key of the caller.
        origin_id: The job that it retries.
    """

    spec: JobSpec
    key: str | None
    api_key_id: str | None
    origin_id: str | None

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the request, without its priority, which changes no result."""
        request = self.spec.model_dump_json(exclude={"priority"})
        content = f"{kind_of(self.spec).name} {self.origin_id} {request}"
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True)
class _NewJob:
    """All that is inserted for a new job.

    Attributes:
        checked: The checked request.
        spec: It as JSON.
        work: The work of all stages of all rounds.
        stages: The first stages.
        sources: The jobs whose samples, pairs or models it uses.
    """

    checked: Checked[Any]
    spec: dict[str, Any]
    work: float
    stages: Sequence[PlannedStage]
    sources: set[str]


def _check(service: Service, request: _Request) -> _NewJob | None:
    """Check the request and plan its job. None if an earlier request with the same key has created a job."""
    with service.uow.reading() as session:
        if _earlier(session, request) is not None:
            return None
        checked = check(service.catalogue, service.settings, session, request.spec)
        sources = used_jobs(session, checked)

    spec = checked.spec
    return _NewJob(
        checked, spec.model_dump(mode="json"), total_work(spec, checked.sizes), plan_start(spec, checked.sizes), sources
    )


def _earlier(session: Session, request: _Request) -> str | None:
    """The job that an earlier request with the same key has created, or that has made the same previews.

    Raises IdempotencyError if the key was used with another request.
    """
    earlier = None if request.key is None else jobs.by_key(session, request.key)
    if earlier is not None and earlier.fingerprint != request.fingerprint:
        raise IdempotencyError("this Idempotency-Key was used with another request")
    if earlier is not None:
        return earlier.job_id
    return job_with_previews(session, request.spec) if isinstance(request.spec, PreviewJobSpec) else None


def _stored_key(key: str | None, api_key_id: str | None) -> str | None:
    """An Idempotency-Key as it is stored. Equal keys of different callers stay distinct."""
    if key is None or api_key_id is None:
        return key
    return hashlib.sha256(f"{api_key_id} {key}".encode()).hexdigest()


def _create(service: Service, session: Session, request: _Request, new: _NewJob | None) -> tuple[str, bool]:
    """The id of the job, and whether it is new."""
    # 1. an earlier request with the same key
    earlier_id = _earlier(session, request)
    if earlier_id is not None:
        return earlier_id, False

    # 2. a new job
    if new is None:
        raise ConflictError("the job that this Idempotency-Key has created was removed: send the request again")
    limits.require_capacity(session, service.settings, request.api_key_id)
    job = _insert(session, request, new)
    if request.key is not None:
        jobs.add_key(session, request.key, request.fingerprint, job.id)
    return job.id, True


def _insert(session: Session, request: _Request, new: _NewJob) -> Job:
    """Insert the job, its own prompts, its first stages and its first event."""
    checked = new.checked
    spec = checked.spec
    if checked.new_set is not None:
        results.add_all(session, [checked.new_set])

    job = jobs.add(
        session,
        kind=kind_of(spec).name,
        spec=new.spec,
        label=spec.label,
        priority=spec.priority,
        rounds=rounds_of(spec),
        model_id=checked.model.id if checked.model else None,
        prompt_set_id=checked.prompt_set.id if checked.prompt_set else None,
        held_out_prompt_set_id=checked.held_out_set.id if checked.held_out_set else None,
        origin_id=request.origin_id,
        api_key_id=request.api_key_id,
        work_total=new.work,
    )

    jobs.add_sources(session, job, new.sources)
    jobs.add_prompt_sets(session, job, checked.prompt_set_ids)
    execution.add_stages(session, job.id, new.stages)
    jobs.add_event(session, job.id, "job.created", "the job is queued")
    return job


def save_prompt_set(service: Service, name: str, description: str, prompts: Sequence[Prompt]) -> tuple[PromptSet, bool]:
    """Save prompts as the newest version of a prompt set.

    Prompts equal to the newest version create nothing and leave its description unchanged.

    Returns:
        The newest version, and whether it is new.

    Raises:
        ConflictError: The name belongs to a built-in list.
    """

    def save(session: Session) -> tuple[PromptSet, bool]:
        newest = prompt_sets.latest(session, name)
        if newest is not None and newest.builtin:
            raise ConflictError(f"{name!r} is the name of a built-in prompt list; choose another name")
        if newest is not None and prompt_sets.holds(newest, prompts):
            return newest, False

        version = newest.version + 1 if newest else 1
        row = prompt_sets.add(session, prompt_sets.unsaved(prompts, name, description, version=version))
        session.refresh(row)  # reads the time that the database set
        return row, True

    def is_saved(session: Session, saved: tuple[PromptSet, bool]) -> bool:
        return prompt_sets.by_id(session, saved[0].id) is not None

    try:
        return service.uow.run(save, is_saved)
    except IntegrityError:  # a concurrent request created this version
        return service.uow.run(save, is_saved)


def delete_prompt_set(service: Service, name_or_id: str) -> None:
    """Delete a prompt set that no job uses: all versions of a name, or the version with an id.

    Raises:
        NotFoundError: No such prompt set exists.
        PromptSetInUseError: Jobs use one of the versions.
        ConflictError: It is a built-in list.
    """
    deletion.delete_prompt_set(service.uow, name_or_id)


def cancel_job(service: Service, job_id: str) -> None:
    """Cancel a job. A job that has ended does not change. Raises NotFoundError."""
    service.uow.run(lambda session: execution.cancel(session, jobs.get(session, job_id).id), repeatable)


def pause_job(service: Service, job_id: str) -> None:
    """Pause a job until it is resumed. Raises NotFoundError, or ConflictError if it has ended."""
    service.uow.run(lambda session: execution.pause(session, jobs.get(session, job_id).id), repeatable)


def resume_job(service: Service, job_id: str) -> None:
    """Resume a paused job. Raises NotFoundError, or ConflictError for other jobs."""
    with service.uow.writing() as session:
        execution.resume(session, jobs.get(session, job_id).id)


def skip_review(service: Service, job_id: str) -> None:
    """Let a job that waits for verdicts continue with the existing ones. Raises NotFoundError or ConflictError."""
    with service.uow.writing() as session:
        execution.skip_review(session, jobs.get(session, job_id).id)


def retry_job(service: Service, job_id: str, key: str | None = None, api_key_id: str | None = None) -> str:
    """Create a new job from the request of a failed or cancelled one.

    The new job uses the same models and prompt sets, even if their names now refer to others.

    Returns:
        The id of the new job, or of the job that the same request with the same `key` created before.

    Raises:
        NotFoundError: No such job exists.
        ConflictError: The job has neither failed nor been cancelled.
        IdempotencyError: The key was used with another request.
    """
    with service.uow.reading() as session:
        job = jobs.get(session, job_id)
        if job.state not in (JobState.FAILED, JobState.CANCELLED):
            raise ConflictError(f"{job.id} is {job.state}: only failed and cancelled jobs can be retried")
        spec = _with_ids(session, job)
    return create_job(service, spec, key, api_key_id=api_key_id, origin_id=job_id)


def continue_job(service: Service, job_id: str) -> None:
    """Continue a failed or cancelled job with the stages that have not succeeded.

    Raises:
        NotFoundError: No such job exists.
        ConflictError: The job is in another state, its last stages are still stopping, or it has no stage to continue.
        OverloadError: Too many jobs are queued, or the disk is almost full.
    """
    with service.uow.writing() as session:
        job = jobs.get(session, job_id)
        limits.require_capacity(session, service.settings, job.api_key_id)
        execution.reopen(session, job.id)


def raise_rounds(service: Service, job_id: str, rounds: int, stop_when: StopWhen | None = None) -> None:
    """Raise the number of rounds of a round job that has succeeded. It continues with the round after its last one.

    Its outputs are those of a job with this number of rounds from the start. Does nothing if it has this number.

    Args:
        service: The installation.
        job_id: The job.
        rounds: The number of all its rounds.
        stop_when: The warning signs that end it before them; None is as before.

    Raises:
        NotFoundError: No such job exists.
        ConflictError: It is no round job, or has not succeeded.
        InvalidRequestError: It has more rounds, or would exceed the limits of the settings.
        OverloadError: Too many jobs are queued, or the disk is almost full.
    """
    with service.uow.reading() as session:
        further = extension.plan_extension(session, service.settings, service.catalogue, job_id, rounds, stop_when)
    if further is None:
        return

    def extend(session: Session) -> None:
        limits.require_capacity(session, service.settings, jobs.get(session, job_id).api_key_id)
        extension.extend(session, job_id, rounds, further)

    service.uow.run(extend, repeatable)


def delete_job(service: Service, job_id: str) -> None:
    """Delete a job with its results: they are hidden at once, and collections remove them.

    Raises:
        NotFoundError: No such job exists.
        JobInUseError: Other jobs, aliases or preference tests use its results.
        ConflictError: The job has not ended, or its last stages are still stopping.
    """
    deletion.delete_job(service.uow, job_id)


def _with_ids(session: Session, job: Job) -> JobSpec:
    """The request of the job, with every name replaced by the id that it referred to."""
    spec = job_spec(job)
    ids: dict[str, Any] = {
        "model": job.model_id,
        "prompt_set": job.prompt_set_id,
        "held_out_prompt_set": job.held_out_prompt_set_id,
    }
    resolved = kind_of(spec).resolved
    if resolved is not None:
        ids |= resolved(stages.params_of_job(session, job.id))
    return spec.model_copy(update={name: id_ for name, id_ in ids.items() if getattr(spec, name, None) is not None})


def job_spec(job: Job) -> JobSpec:
    """The request that created the job."""
    return spec_of(job.kind, job.spec)


def give_verdict(
    service: Service, pair_id: str, verdict: Verdict | None, reviewer: str | None, revision: int | None
) -> Pair:
    """Record a reviewer's verdict on a pair. The last verdict ends the job's review.

    Args:
        service: The installation.
        pair_id: The pair.
        verdict: The verdict; None removes it.
        reviewer: The name of the reviewer; None if it is not known.
        revision: The revision of the pair that the reviewer saw; None skips this check.

    Returns:
        The pair with its new revision.

    Raises:
        NotFoundError: No such pair exists.
        ConflictError: The target of the pair is not verified yet, or the pair has too many reviewers.
        PreconditionError: The verdict of this reviewer has changed since `revision`.
    """
    with service.uow.writing() as session:
        pair = results.get_pair(session, pair_id)
        job = jobs.lock(session, pair.job_id)
        pair = results.lock_pair(session, pair_id)

        if pair.adopted is None:
            raise ConflictError(f"{pair.id} is incomplete: its target is not verified yet")
        if revision is not None:
            _require_unchanged(pair, verdicts.own_revision(session, pair, reviewer), revision)

        verdicts.give(session, pair, verdict, reviewer)
        if job.state == JobState.WAITING and not verdicts.any_missing(session, job.id):
            execution.end_review(session, job, "every pair has a verdict")
        return pair


def set_gold(service: Service, pair_id: str, expected: Verdict | None) -> None:
    """Make a pair a gold pair with this expected verdict; None makes it an ordinary one. Raises NotFoundError."""

    def save(session: Session) -> None:
        results.lock_pair(session, results.get_pair(session, pair_id).id).gold = expected

    service.uow.run(save, repeatable)


def _require_unchanged(pair: Pair, own: int, revision: int) -> None:
    """Raises PreconditionError if a reviewer's verdict, of the revision `own` of the pair, has changed since."""
    if not own <= revision <= pair.revision:
        expected = f"from {own} to {pair.revision}" if own < pair.revision else str(own)
        raise PreconditionError(f"expected revision {expected} of {pair.id}, got {revision}: reload the pair")


def set_alias(service: Service, name: str, model: str) -> None:
    """Let an alias refer to a model, which is given by its id, name or alias.

    Raises:
        ConflictError: The alias is the name of a base model.
        InvalidRequestError: The model is unknown.
    """
    if name in service.catalogue.models:
        raise ConflictError(f"{name!r} is the name of a base model")

    def save(session: Session) -> None:
        row = results.find_model(session, model)
        if row is None:
            raise InvalidRequestError.at("/model", unknown_model(service.catalogue, model), "unknown_model")
        if row.job_id is not None:
            jobs.lock_kept(session, row.job_id)  # it cannot be deleted meanwhile
        results.set_alias(session, name, row.id)

    try:
        service.uow.run(save, repeatable)
    except IntegrityError:  # a concurrent request created this alias
        service.uow.run(save, repeatable)
