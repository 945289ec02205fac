"""What workers do to stages: claim, renew, finish, fail, give back. Every write carries the lease's epoch.

The job's row is locked before its stages are ended, so two stages that end at once see each other.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from api.core.errors import LeaseLostError, StageCancelledError
from api.core.planning import plan_round
from api.core.queries import jobs, prompt_sets, stages
from api.core.queue import queue_of
from api.core.settings import Settings
from api.core.specs import RoundSpec
from api.core.states import JobState, StageKind, StageState
from api.core.storage import StoredObject
from api.core.tables import Job, Stage
from api.core.unit_of_work import UnitOfWork, hint_after_commit

_LONGEST_PAUSE_SECONDS = 300.0


@dataclass(frozen=True)
class Claim:
    """A stage under this worker's lease, with what is needed to do it."""

    stage_id: str
    job_id: str
    kind: StageKind
    round: int
    shard: int
    params: dict[str, Any]
    epoch: int
    attempt: int
    checkpoint: StoredObject | None
    spec: RoundSpec


@dataclass(frozen=True)
class Failure:
    """Why a stage failed: a code for programs, a message for people, and whether trying again may help."""

    code: str
    message: str
    retryable: bool


def claim(
    uow: UnitOfWork,
    settings: Settings,
    owner: str,
    queues: Sequence[str] | None = None,
    prefer_base: str | None = None,
) -> Claim | None:
    """Take a free stage of these queues (None: of any), rather one of the base model that is loaded; None if none."""
    with uow.reading() as session:
        if not stages.any_free(session, queues):
            return None
    with uow.writing() as session:
        stage = stages.claim(session, owner, settings.lease_seconds, queues, prefer_base)
        if stage is None:
            return None
        jobs.start(session, stage.job_id)
        message = f"{stage.kind} of round {stage.round} started, attempt {stage.attempt}"
        jobs.add_event(session, stage.job_id, "stage.started", message, stage.id, **_about(stage), worker=owner)
        return _as_claim(stage, jobs.get(session, stage.job_id))


def _as_claim(stage: Stage, job: Job) -> Claim:
    checkpoint = None
    if stage.checkpoint_key is not None and stage.checkpoint_sha256 is not None:
        checkpoint = StoredObject(stage.checkpoint_key, stage.checkpoint_sha256, 0)
    return Claim(
        stage_id=stage.id,
        job_id=stage.job_id,
        kind=StageKind(stage.kind),
        round=stage.round,
        shard=stage.shard,
        params=stage.params,
        epoch=stage.lease_epoch,
        attempt=stage.attempt,
        checkpoint=checkpoint,
        spec=RoundSpec.model_validate(job.spec),
    )


def _about(stage: Stage) -> dict[str, object]:
    return {"stage": stage.kind, "round": stage.round, "shard": stage.shard, "attempt": stage.attempt}


def beat(uow: UnitOfWork, settings: Settings, held: Claim, done: int, total: int) -> bool:
    """Renew the lease with the progress made; whether a cancel was asked for. Raises LeaseLostError."""
    with uow.writing() as session:
        return stages.beat(session, held.stage_id, held.epoch, settings.lease_seconds, done, total)


def checkpoint(uow: UnitOfWork, held: Claim, stored: StoredObject) -> None:
    """Remember a checkpoint to go on from. Raises LeaseLostError."""
    with uow.writing() as session:
        stages.save_checkpoint(session, held.stage_id, held.epoch, stored.key, stored.sha256)


def note(uow: UnitOfWork, held: Claim, kind: str, message: str, **data: object) -> None:
    """Write into the job's log, if the lease is still held."""
    with uow.writing() as session:
        stages.require_lease(session, held.stage_id, held.epoch)
        jobs.add_event(session, held.job_id, kind, message, held.stage_id, **data)


def finish(uow: UnitOfWork, settings: Settings, held: Claim, record: Callable[[Session], None]) -> None:
    """The stage has succeeded: what it made, its state, and what follows from it become visible at once.

    Raises LeaseLostError, or StageCancelledError where a cancel came first; nothing is written then.
    """
    with uow.writing() as session:
        job = jobs.lock(session, held.job_id)
        if not stages.succeed(session, held.stage_id, held.epoch):
            raise StageCancelledError("a cancel was asked for before the stage ended")
        record(session)
        stage = stages.get(session, held.stage_id)
        jobs.add_event(
            session, job.id, "stage.succeeded", f"{stage.kind} of round {stage.round} done", stage.id, **_about(stage)
        )
        if held.kind is StageKind.TRAIN and held.round < held.spec.rounds:
            _plan_next_round(session, settings, job, held)
        hint_free(session, job.id)
        _settle(session, job)


def _plan_next_round(session: Session, settings: Settings, job: Job, held: Claim) -> None:
    prompts = prompt_sets.size(session, job.prompt_set_id)
    held_out = 0 if job.held_out_prompt_set_id is None else prompt_sets.size(session, job.held_out_prompt_set_id)
    stages.add(session, job.id, plan_round(held.spec, held.round + 1, prompts, held_out, settings.shard_prompts))


def cancelled(uow: UnitOfWork, held: Claim) -> None:
    """The stage has stopped because a cancel was asked for."""
    with uow.writing() as session:
        job = jobs.lock(session, held.job_id)
        stages.end(session, held.stage_id, held.epoch, StageState.CANCELLED, "cancelled", "a cancel was asked for")
        _settle(session, job)


def give_back(uow: UnitOfWork, held: Claim) -> None:
    """This worker stops; another may go on at once."""
    with uow.writing() as session:
        jobs.lock(session, held.job_id)
        stages.give_back(session, held.stage_id, held.epoch)
        jobs.add_event(session, held.job_id, "stage.given_back", f"{held.kind} goes back to the queue", held.stage_id)
        hint_free(session, held.job_id)


def fail(uow: UnitOfWork, settings: Settings, held: Claim, failure: Failure) -> None:
    """The attempt failed: tried again later where that may help, otherwise the job fails."""
    with uow.writing() as session:
        job = jobs.lock(session, held.job_id)
        _end_attempt(session, settings, job, stages.get(session, held.stage_id), held.epoch, failure)


def _end_attempt(session: Session, settings: Settings, job: Job, stage: Stage, epoch: int, failure: Failure) -> None:
    about = {**_about(stage), "code": failure.code}
    if failure.retryable and stage.attempt < settings.max_attempts and stage.cancel_requested_at is None:
        pause = min(settings.retry_seconds * 2 ** (stage.attempt - 1), _LONGEST_PAUSE_SECONDS)
        pause *= random.uniform(0.5, 1.0)
        stages.requeue(session, stage.id, epoch, pause, failure.code, failure.message)
        jobs.add_event(session, job.id, "stage.retried", failure.message, stage.id, **about, pause_seconds=pause)
        return
    state = StageState.FAILED if stage.cancel_requested_at is None else StageState.CANCELLED
    stages.end(session, stage.id, epoch, state, failure.code, failure.message)
    jobs.add_event(session, job.id, "stage.failed", failure.message, stage.id, **about)
    if state is StageState.FAILED:
        stages.call_off(session, job.id)
        if jobs.end(session, job.id, JobState.FAILED, failure.code, failure.message):
            jobs.add_event(session, job.id, "job.failed", failure.message, code=failure.code)
    else:
        _settle(session, job)


def hint_free(session: Session, job_id: str) -> None:
    """After the commit, hint the stages of the job that this transaction has made free."""
    _hint(session, stages.mark_free(session, job_id))


def hint_again(uow: UnitOfWork, settings: Settings) -> int:
    """Hint the free stages whose hint seems to be lost, and those that became free by time alone; how many."""
    with uow.reading() as session:
        if not stages.any_unheard(session, settings.rehint_seconds):
            return 0
    with uow.writing() as session:
        unheard = stages.mark_unheard(session, settings.rehint_seconds)
        _hint(session, unheard)
        return len(unheard)


def _hint(session: Session, free: Sequence[Stage]) -> None:
    hint_after_commit(session, [(stage.id, queue_of(StageKind(stage.kind))) for stage in free])


def sweep(uow: UnitOfWork, settings: Settings) -> int:
    """Queue the stages again whose workers went silent; how many there were."""
    with uow.reading() as session:
        if not stages.expired(session):
            return 0
    with uow.writing() as session:
        return _lose(session, settings, stages.expired(session))


def lose_workers(uow: UnitOfWork, settings: Settings, owner_prefix: str) -> int:
    """The workers whose names begin so are known to be dead: their stages go back to the queue now."""
    with uow.writing() as session:
        return _lose(session, settings, stages.running_under(session, owner_prefix))


def _lose(session: Session, settings: Settings, lost: list[Stage]) -> int:
    count = 0
    for stage in lost:
        job = jobs.lock(session, stage.job_id)
        try:
            stages.count_crash(session, stage.id, stage.lease_epoch)
        except LeaseLostError:
            continue
        stage = stages.get(session, stage.id)
        message = f"the worker of {stage.kind} was lost ({stage.crash_count} of at most {settings.max_crashes} times)"
        retryable = stage.crash_count < settings.max_crashes
        _end_attempt(session, settings, job, stage, stage.lease_epoch, Failure("worker_lost", message, retryable))
        count += 1
    return count


def _settle(session: Session, job: Job) -> None:
    """End the job if none of its stages is left."""
    if stages.count_unfinished(session, job.id) > 0:
        return
    state = JobState.SUCCEEDED if job.cancel_requested_at is None else JobState.CANCELLED
    if jobs.end(session, job.id, state):
        jobs.add_event(
            session,
            job.id,
            f"job.{state}",
            "every stage has succeeded" if state is JobState.SUCCEEDED else "the job is cancelled",
        )


def cancel(session: Session, job_id: str) -> None:
    """Call the job off: at once where nothing of it runs, otherwise as soon as its running stages notice."""
    job = jobs.lock(session, job_id)
    if JobState(job.state).is_final or job.cancel_requested_at is not None:
        return
    jobs.request_cancel(session, job.id)
    jobs.add_event(session, job.id, "job.cancel_requested", "a cancel was asked for")
    stages.call_off(session, job.id)
    _settle(session, jobs.lock(session, job.id))
