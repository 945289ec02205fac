"""What the service does for its clients: check a request, make a job of it, call it off."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from dfusion.prompts import Prompt, builtin_lists
from service.catalogue import Catalogue
from service.db.locks import AdvisoryLock, hold
from service.db.migrate import migrate
from service.db.queries import jobs, prompt_sets, results, stages
from service.db.tables import Job, Pair, PromptSet
from service.db.unit_of_work import UnitOfWork, repeatable
from service.errors import ConflictError, IdempotencyError, PreconditionError
from service.jobs import execution, limits
from service.jobs.checking import check
from service.jobs.kinds import JobSpec, kind_of, spec_of
from service.jobs.kinds.base import Checked
from service.jobs.planning import count, plan_start, rounds_of, total_work
from service.plan import Sizes, WorkCounts
from service.queue import Queue
from service.settings import Settings
from service.states import JobKind, JobState, Verdict
from service.storage import Store, open_store

T = TypeVar("T")


@dataclass(frozen=True)
class Service:
    """An installation: its settings, database, store and catalogue."""

    settings: Settings
    uow: UnitOfWork
    store: Store
    catalogue: Catalogue

    @classmethod
    def open(cls, settings: Settings, queue: Queue | None = None) -> Service:
        """Open the installation, bringing its database up to date; hints go to `queue`. Raises StartError."""
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        uow = UnitOfWork.connect(settings.database, queue)
        catalogue = Catalogue.of(settings)
        migrate(uow.engine, settings.data_dir / "migrate.lock")
        with uow.writing() as session:
            hold(session, AdvisoryLock.CATALOGUE)
            prompt_sets.ensure_builtin(session, builtin_lists().values())
            results.ensure_base_models(session, catalogue.models)
        return cls(settings, uow, open_store(settings), catalogue)

    def close(self) -> None:
        """Give the database's connections back."""
        self.uow.close()


def estimate_job(service: Service, spec: JobSpec) -> tuple[WorkCounts, Sizes]:
    """What the job would take. Raises InvalidRequestError as `create_job` does; makes nothing."""
    with service.uow.reading() as session:
        checked = check(service.catalogue, service.settings, session, spec)
        return count(checked.spec, checked.sizes), checked.sizes


def create_job(
    service: Service, spec: JobSpec, key: str | None = None, api_key_id: str | None = None, origin_id: str | None = None
) -> str:
    """The id of a new job with its first stages, or of the one that the same request made under the same key.

    Raises InvalidRequestError, IdempotencyError where the key came with another request before, or OverloadError.
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
    """`create_job`, and what `read` gives of that job: of a new one in the transaction that makes it, which spares
    another; of one that was there before in a view of its own.
    """
    key = _own_key(key, api_key_id)

    def create(session: Session) -> tuple[str, list[T]]:
        job_id, is_new = _create(service, session, spec, key, api_key_id, origin_id)
        return job_id, [read(session, job_id)] if is_new else []

    def is_created(session: Session, created: tuple[str, list[T]]) -> bool:
        return jobs.exists(session, created[0])

    try:
        job_id, found = service.uow.run(create, is_created)
    except IntegrityError:  # the same key at the same moment, on a database that writes in parallel
        job_id, found = service.uow.run(create, is_created)
    if found:
        return found[0]
    with service.uow.reading() as session:
        return read(session, job_id)


def _own_key(key: str | None, api_key_id: str | None) -> str | None:
    """An Idempotency-Key as it is stored: callers that choose the same do not meet."""
    if key is None or api_key_id is None:
        return key
    return hashlib.sha256(f"{api_key_id} {key}".encode()).hexdigest()


def _create(
    service: Service,
    session: Session,
    spec: JobSpec,
    key: str | None,
    api_key_id: str | None,
    origin_id: str | None,
) -> tuple[str, bool]:
    """The job's id, and whether it was made now."""
    kind = kind_of(spec).name
    fingerprint = hashlib.sha256(f"{kind} {origin_id} {spec.model_dump_json()}".encode()).hexdigest()
    known = None if key is None else jobs.by_key(session, key)
    if known is not None:
        if known.fingerprint != fingerprint:
            raise IdempotencyError("this Idempotency-Key came with another request before")
        return known.job_id, False
    checked = check(service.catalogue, service.settings, session, spec)
    limits.require_room(session, service.settings, api_key_id)
    job = _insert(session, kind, checked, origin_id, api_key_id)
    if key is not None:
        jobs.add_key(session, key, fingerprint, job.id)
    return job.id, True


def _insert(
    session: Session, kind: JobKind, checked: Checked[Any], origin_id: str | None, api_key_id: str | None
) -> Job:
    spec = checked.spec
    if checked.new_set is not None:
        results.add_all(session, [checked.new_set])
    job = jobs.add(
        session,
        kind=kind,
        spec=spec.model_dump(mode="json"),
        label=spec.label,
        rounds=rounds_of(spec),
        model_id=checked.model.id if checked.model else None,
        prompt_set_id=checked.prompt_set.id if checked.prompt_set else None,
        held_out_prompt_set_id=checked.held_out_set.id if checked.held_out_set else None,
        origin_id=origin_id,
        api_key_id=api_key_id,
        work_total=total_work(spec, checked.sizes),
    )
    execution.add_stages(session, job.id, plan_start(spec, checked.sizes))
    jobs.add_event(session, job.id, "job.created", "the job is queued")
    return job


def save_prompt_set(service: Service, name: str, description: str, prompts: Sequence[Prompt]) -> tuple[PromptSet, bool]:
    """The newest version of the set of that name, and whether it was made now, because the prompts are others.

    The same prompts again make nothing: the description stays, too. Raises ConflictError for a built-in list's name.
    """

    def save(session: Session) -> tuple[PromptSet, bool]:
        known = prompt_sets.latest(session, name)
        if known is not None and known.builtin:
            raise ConflictError(f"{name!r} is the name of a list that comes with D-Fusion; choose another")
        if known is not None and prompt_sets.holds(known, prompts):
            return known, False
        version = known.version + 1 if known else 1
        row = prompt_sets.add(session, prompt_sets.unsaved(prompts, name, description, version=version))
        session.refresh(row)  # the database gave it its time
        return row, True

    def saved(session: Session, found: tuple[PromptSet, bool]) -> bool:
        return prompt_sets.by_id(session, found[0].id) is not None

    try:
        return service.uow.run(save, saved)
    except IntegrityError:  # another made that version at the same moment, on a database that writes in parallel
        return service.uow.run(save, saved)


def cancel_job(service: Service, job_id: str) -> None:
    """Call a job off; one that has ended stays as it is. Raises NotFoundError."""
    service.uow.run(lambda session: execution.cancel(session, jobs.get(session, job_id).id), repeatable)


def pause_job(service: Service, job_id: str) -> None:
    """Let nothing more of a job begin until it is resumed. Raises NotFoundError, ConflictError."""
    service.uow.run(lambda session: execution.pause(session, jobs.get(session, job_id).id), repeatable)


def resume_job(service: Service, job_id: str) -> None:
    """Go on with a job that is paused or waits for verdicts. Raises NotFoundError, ConflictError."""
    with service.uow.writing() as session:
        execution.resume(session, jobs.get(session, job_id).id)


def retry_job(service: Service, job_id: str, key: str | None = None, api_key_id: str | None = None) -> str:
    """The id of a new job with the request of one that failed or was cancelled, or of the one made under the same key.
    It has the models and prompt sets of the first, also where their names mean something else by now.

    Raises NotFoundError, ConflictError, IdempotencyError.
    """
    with service.uow.reading() as session:
        job = jobs.get(session, job_id)
        if job.state not in (JobState.FAILED, JobState.CANCELLED):
            raise ConflictError(f"{job.id} is {job.state}: only a job that failed or was cancelled can be tried again")
        spec = _as_resolved(session, job)
    return create_job(service, spec, key, api_key_id=api_key_id, origin_id=job_id)


def _as_resolved(session: Session, job: Job) -> JobSpec:
    """The job's request with the ids of what it names in place of names."""
    spec = job_spec(job)
    meant: dict[str, Any] = {
        "model": job.model_id,
        "prompt_set": job.prompt_set_id,
        "held_out_prompt_set": job.held_out_prompt_set_id,
    }
    meant |= kind_of(spec).resolved([stage.params for stage in stages.of_job(session, job.id)])
    return spec.model_copy(update={name: to for name, to in meant.items() if getattr(spec, name, None) is not None})


def job_spec(job: Job) -> JobSpec:
    """The request that the job was made from."""
    return spec_of(job.kind, job.spec)


def give_verdict(
    service: Service, pair_id: str, verdict: Verdict | None, reviewer: str | None, revision: int | None
) -> Pair:
    """A person's word on a pair (None takes it back); the review that waits for the last one is done with it.

    `revision` is the one that the person saw. Raises NotFoundError, ConflictError where the pair has no target yet,
    PreconditionError where somebody else was faster.
    """
    with service.uow.writing() as session:
        pair = results.get_pair(session, pair_id)
        job = jobs.lock(session, pair.job_id)
        pair = results.lock_pair(session, pair_id)
        if pair.adopted is None:
            raise ConflictError(f"{pair.id} is still being made: there is nothing to judge yet")
        if revision is not None and revision != pair.revision:
            raise PreconditionError(f"{pair.id} is at revision {pair.revision}, not {revision}: look at it again")
        results.set_verdict(session, pair, verdict, reviewer)
        if job.state == JobState.WAITING and not results.pairs_without_verdict(session, job.id):
            execution.end_review(session, job, "every pair has a verdict")
        return pair


def set_alias(service: Service, name: str, model_id: str) -> None:
    """Call a model by that name from now on. Raises NotFoundError, ConflictError for a base model's own name."""
    if name in service.catalogue.models:
        raise ConflictError(f"{name!r} is the name of a base model")

    def save(session: Session) -> None:
        results.set_alias(session, name, results.get_model(session, model_id).id)

    try:
        service.uow.run(save, repeatable)
    except IntegrityError:  # the same new name at the same moment, on a database that writes in parallel
        service.uow.run(save, repeatable)
