"""What workers do to stages: claim, renew, finish, fail, give back. Every write carries the lease's epoch.

The job's row is locked before its stages, always: two stages that end at once see each other, and no two transactions
wait for each other. Ends of stages are tried again for as long as the lease may be valid. Where the reply to a commit
was lost, the stage's epoch tells what became of it: nobody else writes under it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from service.db.queries import jobs, prompt_sets, results, stages
from service.db.queries.stages import StopRequest
from service.db.tables import Job, Stage
from service.db.unit_of_work import UnitOfWork, hint_after_commit, repeatable
from service.errors import ConflictError, StageCancelledError
from service.jobs.kinds import JobSpec, spec_of
from service.jobs.kinds.rounds import measured_splits
from service.jobs.planning import plan_round, rounds_of
from service.plan import PlannedStage, Sizes
from service.settings import Settings
from service.states import FINAL_JOB_STATES, JobState, StageKind, StageState
from service.storage import StoredObject

WORKER_LOST = "worker_lost"
_LONGEST_PAUSE_SECONDS = 300.0
_CANDIDATES = 8
"""How many free stages a worker looks at before it looks anew: others claim at the same time."""
_LOOKS = 3


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
    prompt_set_id: str | None
    spec: JobSpec


@dataclass(frozen=True)
class StageFailure:
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
    return uow.run(lambda session: _claim(session, settings, owner, queues, prefer_base), _is_claimed)


def _claim(
    session: Session, settings: Settings, owner: str, queues: Sequence[str] | None, prefer_base: str | None
) -> Claim | None:
    for stage_id, job_id in _candidates(session, queues, prefer_base):
        trial = session.begin_nested()  # undone where others were faster: nobody holds one job and waits for another
        jobs.lock(session, job_id)  # a job's events are written one after the other, so that their ids tell the order
        jobs.start(session, job_id)
        stage = stages.claim(session, stage_id, owner, settings.lease_seconds)
        if stage is None:
            trial.rollback()
        else:
            again = f", attempt {stage.attempt}" if stage.attempt > 1 else ""
            message = f"{_named(session, stage)} started{again}"
            jobs.add_event(session, job_id, "stage.started", message, stage_id, **_about(stage), worker=owner)
            return _as_claim(stage, jobs.get(session, job_id))
    return None


def _candidates(session: Session, queues: Sequence[str] | None, prefer_base: str | None) -> Iterator[tuple[str, str]]:
    """Free stages and their jobs; looked for again where others were faster, but not for ever."""
    for _ in range(_LOOKS):
        yield from stages.first_free(session, _CANDIDATES, queues, prefer_base)


def _is_claimed(session: Session, taken: Claim | None) -> bool:
    return taken is None or stages.is_held(session, taken.stage_id, taken.epoch)


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
        prompt_set_id=job.prompt_set_id,
        spec=spec_of(job.kind, job.spec),
    )


def _named(session: Session, stage: Stage | Claim) -> str:
    """The stage as the log names it: "train of round 1", or "sample of round 1, shard 3 of 10" if there are several."""
    name = f"{stage.kind} of round {stage.round}"
    shards = stages.count_shards(session, stage.job_id, stage.round, stage.kind)
    return name if shards == 1 else f"{name}, shard {stage.shard + 1} of {shards}"


def _about(stage: Stage) -> dict[str, object]:
    return {"stage": stage.kind, "round": stage.round, "shard": stage.shard, "attempt": stage.attempt}


def renew_lease(uow: UnitOfWork, settings: Settings, held: Claim, done: int, total: int) -> StopRequest:
    """Renew the lease with the progress made; what is wished of the stage. Raises LeaseLostError."""
    with uow.writing() as session:
        return stages.renew_lease(session, held.stage_id, held.epoch, settings.lease_seconds, done, total)


def checkpoint(uow: UnitOfWork, held: Claim, stored: StoredObject) -> None:
    """Remember a checkpoint to go on from. Raises LeaseLostError."""

    def save(session: Session) -> None:
        stages.save_checkpoint(session, held.stage_id, held.epoch, stored.key, stored.sha256)

    uow.run(save, repeatable)


def note(uow: UnitOfWork, held: Claim, kind: str, message: str, **data: object) -> None:
    """Write into the job's log, if the lease is still held."""

    def write(session: Session) -> int:
        jobs.lock(session, held.job_id)
        stages.require_lease(session, held.stage_id, held.epoch)
        return jobs.add_event(session, held.job_id, kind, message, held.stage_id, **data)

    uow.run(write, jobs.has_event)


def finish(
    uow: UnitOfWork,
    settings: Settings,
    held: Claim,
    record: Callable[[Session], None],
    steps: int = 0,
    memory_bytes: int | None = None,
) -> None:
    """The stage has succeeded: what it made, its state, and what follows from it become visible at once.

    `record` is called again after a transaction that was not kept. Raises LeaseLostError, or StageCancelledError
    where a cancel came first; nothing is written then.
    """

    def end(session: Session) -> None:
        job = jobs.lock(session, held.job_id)
        if not stages.succeed(session, held.stage_id, held.epoch, steps, memory_bytes):
            raise StageCancelledError("a cancel was asked for before the stage ended")
        record(session)
        stage = stages.get(session, held.stage_id)
        message = f"{_named(session, stage)} done"
        jobs.add_event(session, job.id, "stage.succeeded", message, stage.id, **_about(stage))
        if held.kind is StageKind.TRAIN and held.round < rounds_of(held.spec):
            sizes = round_sizes(session, settings, job)
            plan = plan_round(held.spec, held.round + 1, sizes)
            last, held_back = stages.last_number(session, job.id), job.pause_requested_at is not None
            add_stages(session, job.id, plan, last, held_back)
        hint_free(session, job.id)
        _settle(session, job)

    def is_ended(session: Session, _result: None) -> bool:
        return stages.has_succeeded(session, held.stage_id, held.epoch)

    uow.run(end, is_ended, settings.lease_seconds)


def _release(uow: UnitOfWork, settings: Settings, held: Claim, release: Callable[[Session, Job], None]) -> None:
    """End the lease without success, as `release` does."""

    def is_over(session: Session, _result: None) -> bool:
        return not stages.is_held(session, held.stage_id, held.epoch)

    uow.run(lambda session: release(session, jobs.lock(session, held.job_id)), is_over, settings.lease_seconds)


def round_sizes(session: Session, settings: Settings, job: Job) -> Sizes:
    """How much the spec of a round job means."""
    if job.prompt_set_id is None:
        raise ConflictError(f"{job.id} has no prompt set")
    ids = [set_id for set_id in (job.prompt_set_id, job.held_out_prompt_set_id) if set_id is not None]
    found = {set_id: prompt_sets.size(session, set_id) for set_id in ids}
    measured = measured_splits(job.prompt_set_id, job.held_out_prompt_set_id, found)
    return Sizes(settings.shard_prompts, found[job.prompt_set_id], measured=measured)


def paused(uow: UnitOfWork, settings: Settings, held: Claim) -> None:
    """The stage has stopped because a pause was asked for; it goes on from here when its job is resumed."""

    def release(session: Session, job: Job) -> None:
        stages.give_back(session, held.stage_id, held.epoch)
        message = f"{_named(session, held)} keeps what it has done"
        jobs.add_event(session, job.id, "stage.paused", message, held.stage_id)
        _settle(session, job)

    _release(uow, settings, held, release)


def cancelled(uow: UnitOfWork, settings: Settings, held: Claim) -> None:
    """The stage has stopped because a cancel was asked for."""

    def release(session: Session, job: Job) -> None:
        stages.end(session, held.stage_id, held.epoch, StageState.CANCELLED, "cancelled", "a cancel was asked for")
        message = f"{_named(session, held)} has stopped"
        jobs.add_event(session, job.id, "stage.cancelled", message, held.stage_id)
        _settle(session, job)

    _release(uow, settings, held, release)


def give_back(uow: UnitOfWork, settings: Settings, held: Claim) -> None:
    """This worker stops; another may go on at once."""

    def release(session: Session, job: Job) -> None:
        stages.give_back(session, held.stage_id, held.epoch)
        message = f"{_named(session, held)} goes back to the queue"
        jobs.add_event(session, job.id, "stage.given_back", message, held.stage_id)
        hint_free(session, job.id)

    _release(uow, settings, held, release)


def fail(uow: UnitOfWork, settings: Settings, held: Claim, failure: StageFailure) -> None:
    """The attempt failed: tried again later where that may help, otherwise the job fails."""

    def release(session: Session, job: Job) -> None:
        _end_attempt(session, settings, job, stages.get(session, held.stage_id), held.epoch, failure)

    _release(uow, settings, held, release)


def _end_attempt(
    session: Session, settings: Settings, job: Job, stage: Stage, epoch: int, failure: StageFailure
) -> None:
    about = {**_about(stage), "code": failure.code}
    # lost workers are counted by themselves, from the last checkpoint on: a training may go on through many
    left = failure.code == WORKER_LOST or stage.attempt < settings.max_attempts
    if failure.retryable and left and stage.cancel_requested_at is None:
        pause = min(settings.retry_seconds * 2 ** (stage.attempt - 1), _LONGEST_PAUSE_SECONDS)
        pause *= random.uniform(0.5, 1.0)
        stages.requeue(session, stage.id, epoch, pause, failure.code, failure.message)
        jobs.add_event(session, job.id, "stage.retried", failure.message, stage.id, **about, pause_seconds=pause)
        return
    state = StageState.FAILED if stage.cancel_requested_at is None else StageState.CANCELLED
    stages.end(session, stage.id, epoch, state, failure.code, failure.message)
    jobs.add_event(session, job.id, "stage.failed", failure.message, stage.id, **about)
    if state is StageState.FAILED:
        stages.cancel_unfinished(session, job.id)
        if jobs.end(session, job.id, JobState.FAILED, failure.code, failure.message):
            jobs.add_event(session, job.id, "job.failed", failure.message, code=failure.code)
    else:
        _settle(session, job)


def add_stages(
    session: Session, job_id: str, plan: Sequence[PlannedStage], after: int = 0, held_back: bool = False
) -> None:
    """Add the planned stages to the job, numbered on from `after`; those that are free are hinted after the commit.

    With `held_back` nothing of the job begins before it is resumed, which hints what is free then.
    """
    free = stages.add(session, job_id, plan, after)
    if held_back:
        stages.hold(session, job_id)
    else:
        hint_after_commit(session, free)


def hint_free(session: Session, job_id: str) -> None:
    """After the commit, hint the stages of the job that this transaction has made free."""
    hint_after_commit(session, stages.mark_free(session, job_id))


def rehint(uow: UnitOfWork, settings: Settings) -> int:
    """Hint the free stages whose hint seems to be lost, and those that became free by time alone; how many."""
    with uow.reading() as session:
        if not stages.any_unheard(session, settings.rehint_seconds):
            return 0

    def hint(session: Session) -> int:
        unheard = stages.mark_unheard(session, settings.rehint_seconds)
        hint_after_commit(session, unheard)
        return len(unheard)

    return uow.run(hint, repeatable)


def sweep(uow: UnitOfWork, settings: Settings) -> int:
    """Queue the stages again whose workers went silent, or hang; how many there were."""
    with uow.reading() as session:
        lost, hanging = stages.expired(session), stages.stuck(session, settings.stuck_seconds)
    silent = sum(_lose(uow, settings, stage, only_expired=True) for stage in lost)
    return silent + sum(_lose(uow, settings, stage, only_expired=False) for stage in hanging)


def requeue_stages_of(uow: UnitOfWork, settings: Settings, owner_prefix: str) -> int:
    """The workers whose names begin so are known to be dead: their stages go back to the queue now."""
    with uow.reading() as session:
        lost = stages.running_under(session, owner_prefix)
    return sum(_lose(uow, settings, stage, only_expired=False) for stage in lost)


def _lose(uow: UnitOfWork, settings: Settings, lost: Stage, only_expired: bool) -> bool:
    """Queue one stage again, unless its lease was renewed or ended meanwhile; whether it was."""

    def release(session: Session) -> bool:
        job = jobs.lock(session, lost.job_id)
        if not stages.count_crash(session, lost.id, lost.lease_epoch, only_expired):
            return False
        stage = stages.get(session, lost.id)
        times = f"{stage.crash_count} of at most {settings.max_crashes} times"
        message = f"the worker of {_named(session, stage)} was lost ({times})"
        retryable = stage.crash_count < settings.max_crashes
        _end_attempt(session, settings, job, stage, stage.lease_epoch, StageFailure(WORKER_LOST, message, retryable))
        return True

    def is_over(session: Session, counted: bool) -> bool:
        return not (counted and stages.is_held(session, lost.id, lost.lease_epoch))

    return uow.run(release, is_over)


def _settle(session: Session, job: Job) -> None:
    """Give the job the state that its stages have made it: ended, paused, waiting for people, or none of these."""
    left = stages.states_left(session, job.id)
    if not left:
        state = JobState.SUCCEEDED if job.cancel_requested_at is None else JobState.CANCELLED
        if jobs.end(session, job.id, state):
            message = "every stage has succeeded" if state is JobState.SUCCEEDED else "the job is cancelled"
            jobs.add_event(session, job.id, f"job.{state}", message)
    elif job.cancel_requested_at is not None or StageState.RUNNING in left:
        return
    elif job.pause_requested_at is not None:
        _become(session, job, JobState.PAUSED, "the job is paused")
    elif stages.waits_for_people(session, job.id):
        if results.pairs_without_verdict(session, job.id):
            _become(session, job, JobState.WAITING, "the job waits for verdicts on its pairs")
        else:  # the last one was given while the job was paused, or something else of it still ran
            end_review(session, job, "every pair has a verdict")


def _become(session: Session, job: Job, state: JobState, message: str) -> None:
    if jobs.become(session, job.id, state):
        jobs.add_event(session, job.id, f"job.{state}", message)


def cancel(session: Session, job_id: str) -> None:
    """Call the job off: at once where nothing of it runs, otherwise as soon as its running stages notice."""
    job = jobs.lock(session, job_id)
    if JobState(job.state).is_final or job.cancel_requested_at is not None:
        return
    jobs.request_cancel(session, job.id)
    jobs.add_event(session, job.id, "job.cancel_requested", "a cancel was asked for")
    stages.cancel_unfinished(session, job.id)
    _settle(session, jobs.lock(session, job.id))


def pause(session: Session, job_id: str) -> None:
    """Nothing more of the job begins; what runs keeps what it has done and stops within a step. Raises ConflictError
    for a job that has ended or is being cancelled."""
    job = jobs.lock(session, job_id)
    if JobState(job.state) in FINAL_JOB_STATES or job.cancel_requested_at is not None:
        raise ConflictError(f"{job.id} is {job.state}: only a job that has not ended can be paused")
    if job.pause_requested_at is not None:
        return
    jobs.request_pause(session, job.id)
    jobs.add_event(session, job.id, "job.pause_requested", "a pause was asked for")
    stages.hold(session, job.id)
    _settle(session, jobs.lock(session, job.id))


def resume(session: Session, job_id: str) -> None:
    """Go on with a paused job, or without further verdicts where it waits for them. Raises ConflictError for others."""
    job = jobs.lock(session, job_id)
    if job.pause_requested_at is not None and JobState(job.state) not in FINAL_JOB_STATES:
        jobs.request_resume(session, job.id)
        jobs.add_event(session, job.id, "job.resumed", "the job goes on")
        stages.release(session, job.id)
        hint_free(session, job.id)
        _settle(session, jobs.lock(session, job.id))
    elif job.state == JobState.WAITING:
        end_review(session, job, "the job goes on with the verdicts that there are")
    else:
        raise ConflictError(f"{job.id} is {job.state}: only a job that is paused or waiting can be resumed")


def end_review(session: Session, job: Job, message: str) -> None:
    """The job's review is done; what waited for it may start. The job's row must be locked."""
    if stages.succeed_reviews(session, job.id):
        jobs.become(session, job.id, JobState.RUNNING)
        jobs.add_event(session, job.id, "review.done", message)
        hint_free(session, job.id)
