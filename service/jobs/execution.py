"""Transitions of stages and jobs: claim, renew, finish, fail, give back, cancel, pause, resume.

Every write of a worker carries the epoch of its lease, and a write with an old epoch raises LeaseLostError.

The row of a job is always locked before its stages. Two stages that end concurrently therefore see each other, and
transactions cannot deadlock. A transaction that ends a stage is retried while the lease can be valid. If the reply to a
commit was lost, the epoch shows whether it took place, since only one worker writes under an epoch.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import ValidationError
from sqlalchemy.orm import Session

from service.db.queries import free_stages, jobs, prompt_sets, stages, verdicts
from service.db.queries.free_stages import FreeGroup
from service.db.queries.stages import StopRequest
from service.db.tables import Job, Stage
from service.db.unit_of_work import UnitOfWork, hint_after_commit, repeatable
from service.errors import ConflictError, StageCancelledError
from service.jobs import watching
from service.jobs.kinds import JobSpec, RoundSpec, spec_of
from service.jobs.kinds.rounds import last_stage_kind, measured_splits, planning_stage_kind
from service.jobs.planning import plan_round
from service.plan import PlannedStage, Sizes
from service.queue import MAX_WAITING_HINTS
from service.settings import Settings
from service.states import FINAL_JOB_STATES, JobState, QueueName, StageKind, StageState
from service.storage import StoredObject

WORKER_LOST = "worker_lost"
_MAX_PAUSE_SECONDS = 300.0
_MAX_PROBLEMS = 5
"""Problems of a stored request that a failure names."""
_GROUPS = 8
"""Groups of free stages that one search returns."""
_SEARCHES = 100
"""A search is repeated if other workers claimed the stages meanwhile. Two searches are nearly always enough."""
_SEARCH_PAUSE_SECONDS = 0.002
_MAX_SEARCH_PAUSE_SECONDS = 0.1
"""Upper bounds of the first and the longest pause between two searches. Pauses are random, so that workers spread."""
_LOCKS = 100
"""Jobs that a claim tries to lock before it waits for one."""
_HINTS_AT_ONCE = 500
"""Stages that one transaction of a sweep marks as hinted."""
_JOBS_AT_ONCE = 100
"""Jobs whose running sums one sweep completes."""
Search = Callable[[Session], list[FreeGroup]]
"""Finds the groups of stages that a worker can claim, best first."""


@dataclass(frozen=True)
class Lease:
    """The lease of a stage.

    Attributes:
        stage_id: The stage.
        job_id: Its job.
        kind: Its kind.
        round: Its round; 0 for jobs without rounds.
        shard: Its index among the stages of this kind and round.
        epoch: The epoch of the lease, which every write carries.
    """

    stage_id: str
    job_id: str
    kind: StageKind
    round: int
    shard: int
    epoch: int


@dataclass(frozen=True)
class Claim(Lease):
    """A stage under the lease of this worker, with all that its attempt needs.

    Attributes:
        params: Its parameters from the plan.
        attempt: The number of this attempt, from 1.
        checkpoint: The checkpoint to continue from.
        prompt_set_id: The prompt set of the job.
        spec: The request of the job.
    """

    params: dict[str, Any]
    attempt: int
    checkpoint: StoredObject | None
    prompt_set_id: str | None
    spec: JobSpec


@dataclass(frozen=True)
class StageFailure:
    """The failure of a stage: a code for programs, a message for people, and whether a retry can succeed."""

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
    """Claim a free stage.

    Args:
        uow: Opens the transaction.
        settings: Gives the duration of the lease.
        owner: The name of the worker.
        queues: The queues to claim from; None is all.
        prefer_base: Claim a stage on another base model only if none on this one is free.

    Returns:
        The claim, or None if no stage is free.

    Raises:
        DBAPIError: The database is unavailable.
    """
    search = partial(free_stages.free_groups, limit=_GROUPS, queues=queues, prefer_base=prefer_base)
    for number in range(_SEARCHES):
        # 1. with a single writer, look before the transaction, which would block other writers
        if uow.has_one_writer and not _any_free(uow, queues):
            return None

        # 2. claim a stage, then read what its attempt needs
        lease = uow.run(partial(_claim, settings=settings, owner=owner, search=search), _is_claimed)
        claimed = None if lease is None else _complete(uow, settings, lease)
        if claimed is not None:
            return claimed

        # 3. search again if a stage is free: other workers claimed the stages of this search
        if lease is None and not _any_free(uow, queues):
            return None
        time.sleep(random.uniform(0.0, min(_MAX_SEARCH_PAUSE_SECONDS, _SEARCH_PAUSE_SECONDS * 2**number)))
    return None


def _any_free(uow: UnitOfWork, queues: Sequence[str] | None) -> bool:
    with uow.reading() as session:
        return free_stages.any_free(session, queues)


def _claim(session: Session, settings: Settings, owner: str, search: Search) -> Lease | None:
    """Claim a stage of the groups that the search returns. None if there is none, or others have claimed its stages.

    The search is part of the transaction, so that it sees the claims that others have just made.
    """
    # 1. the job, then its stage
    locked = _lock_job(session, search)
    if locked is None:
        return None
    group, job = locked
    stage = free_stages.claim(session, group, job, owner, settings.lease_seconds)
    if stage is None:
        return None

    # 2. the state of the job, and the event
    if job.state == JobState.QUEUED:
        jobs.start(session, job.id)
    attempt = f", attempt {stage.attempt}" if stage.attempt > 1 else ""
    message = f"{_label(session, stage)} started{attempt}"
    jobs.add_event(session, job.id, "stage.started", message, stage.id, **_event_data(stage), worker=owner)
    return Lease(stage.id, job.id, StageKind(stage.kind), stage.round, stage.shard, stage.lease_epoch)


def _complete(uow: UnitOfWork, settings: Settings, lease: Lease) -> Claim | None:
    """Read what the attempt needs. If the request of the job cannot be read, the job fails; then None.

    The request, which can be large, is read after the claim, since other claims of the job wait for its lock. The read
    is retried: without it, the stage would wait until its lease expires.
    """
    stage, job = uow.run(partial(stages.get_with_job, stage_id=lease.stage_id), repeatable)
    try:
        spec = spec_of(job.kind, job.spec)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:_MAX_PROBLEMS])
        message = f"this version cannot read the request of the job: {problems}"
        fail(uow, settings, lease, StageFailure("unreadable_request", message, retryable=False))
        return None

    checkpoint = None
    if stage.checkpoint_key is not None and stage.checkpoint_sha256 is not None:
        checkpoint = StoredObject(stage.checkpoint_key, stage.checkpoint_sha256, 0)
    return Claim(
        **vars(lease),
        params=stage.params,
        attempt=stage.attempt,
        checkpoint=checkpoint,
        prompt_set_id=job.prompt_set_id,
        spec=spec,
    )


def _lock_job(session: Session, search: Search) -> tuple[FreeGroup, Job] | None:
    """Lock the job to claim from, with its group. If others have locked all jobs, wait for the first one.

    The lock serializes the events of a job, so that their ids are in order.
    """
    groups = search(session)
    locked = _lock_fairly(session, groups)
    if locked is None and groups:
        jobs.lock(session, groups[0].job_id)
        locked = _lock_fairly(session, search(session))  # the awaited claims have changed the order
    return locked


def _lock_fairly(session: Session, groups: Sequence[FreeGroup]) -> tuple[FreeGroup, Job] | None:
    """Lock a job that no other transaction has locked. None if all are locked.

    A locked job counts as a claim that is about to be committed. Workers that claim at the same time see the same order
    of groups. They are therefore divided among the API keys as if they had claimed one after the other.
    """
    remaining = list(groups)
    claims: Counter[tuple[str, str]] = Counter()

    def turn(group: FreeGroup) -> tuple[bool, int]:
        return not group.is_preferred, group.running + claims[group.queue, group.fair_key]

    for _ in range(_LOCKS):
        if not remaining:
            break
        first = min(range(len(remaining)), key=lambda index: turn(remaining[index]))
        group = remaining[first]
        job = free_stages.lock_if_unlocked(session, group.job_id)
        if job is not None:
            return group, job

        claims[group.queue, group.fair_key] += 1
        following = free_stages.following_job(session, group)
        remaining[first : first + 1] = [] if following is None else [following]
    return None


def _is_claimed(session: Session, lease: Lease | None) -> bool:
    return lease is None or stages.is_held(session, lease.stage_id, lease.epoch)


def _label(session: Session, stage: Stage | Lease) -> str:
    """The stage in messages: "train of round 1", or "sample of round 1, shard 3 of 10" if it is one of several."""
    name = f"{stage.kind} of round {stage.round}"
    shards = stages.count_shards(session, stage.job_id, stage.round, stage.kind)
    return name if shards == 1 else f"{name}, shard {stage.shard + 1} of {shards}"


def _event_data(stage: Stage) -> dict[str, object]:
    return {"stage": stage.kind, "round": stage.round, "shard": stage.shard, "attempt": stage.attempt}


def renew_lease(uow: UnitOfWork, settings: Settings, held: Claim, done: int, total: int) -> StopRequest:
    """Renew the lease and record progress (the heartbeat).

    Args:
        uow: Opens the transaction.
        settings: Gives the duration of the lease.
        held: The claim.
        done: Completed steps.
        total: All steps.

    Returns:
        Whether the job was asked to pause or cancel.

    Raises:
        LeaseLostError: The lease has expired and the stage was requeued, or it has ended.
    """
    with uow.writing() as session:
        return stages.renew_lease(session, held.stage_id, held.epoch, settings.lease_seconds, done, total)


def stop_request(uow: UnitOfWork, held: Claim) -> StopRequest:
    """Whether the job was asked to pause or cancel: one read by primary key. Raises LeaseLostError."""
    with uow.reading() as session:
        return stages.stop_request(session, held.stage_id, held.epoch)


def checkpoint(uow: UnitOfWork, settings: Settings, held: Claim, stored: StoredObject) -> None:
    """Record a checkpoint that the next attempt continues from. Raises LeaseLostError."""

    def save(session: Session) -> None:
        jobs.lock(session, held.job_id)
        stages.save_checkpoint(session, held.stage_id, held.epoch, stored.key, stored.sha256, stored.size_bytes)

    uow.run(save, repeatable, settings.lease_seconds)


def note(uow: UnitOfWork, settings: Settings, held: Claim, kind: str, message: str, **data: object) -> None:
    """Add an event to the log of the job. Raises LeaseLostError."""

    def write(session: Session) -> int:
        jobs.lock(session, held.job_id)
        stages.require_lease(session, held.stage_id, held.epoch)
        return jobs.add_event(session, held.job_id, kind, message, held.stage_id, **data)

    uow.run(write, jobs.has_event, settings.lease_seconds)


def finish(
    uow: UnitOfWork,
    settings: Settings,
    held: Claim,
    record: Callable[[Session], None],
    steps: int = 0,
    memory_bytes: int | None = None,
) -> None:
    """End a stage with success. Its results, its state and the stages that follow become visible together.

    Args:
        uow: Opens the transaction.
        settings: Gives the sizes of the next round's stages, and how long to retry.
        held: The claim.
        record: Writes the results. It is called again if the transaction is retried.
        steps: Completed steps.
        memory_bytes: Peak memory.

    Raises:
        LeaseLostError: The lease is lost; nothing is written.
        StageCancelledError: A cancel was requested first; nothing is written.
    """

    def end(session: Session) -> None:
        # 1. the stage and its results
        job = jobs.lock(session, held.job_id)
        if not stages.succeed(session, held.stage_id, held.epoch, steps, memory_bytes):
            raise StageCancelledError("a cancel was requested before the stage ended")
        record(session)
        stage = stages.get(session, held.stage_id)
        message = f"{_label(session, stage)} done"
        jobs.add_event(session, job.id, "stage.succeeded", message, stage.id, **_event_data(stage))

        # 2. the next round
        plan = _after_round(session, settings, job, held)
        if plan:
            last_number = stages.last_number(session, job.id)
            add_stages(session, job.id, plan, last_number, on_hold=job.pause_requested_at is not None)

        # 3. the stages that are free now, and the state of the job
        hint_free(session, job.id)
        _update_state(session, job)

    def is_ended(session: Session, _result: None) -> bool:
        return stages.has_succeeded(session, held.stage_id, held.epoch)

    uow.run(end, is_ended, settings.lease_seconds)


def _after_round(session: Session, settings: Settings, job: Job, held: Claim) -> Sequence[PlannedStage]:
    """Watch the metrics if this stage ends its round. Returns the stages to add: of the next round, or of a stop."""
    spec = held.spec
    if not isinstance(spec, RoundSpec):
        return []

    sign = None
    if held.kind is last_stage_kind(spec, held.round):
        sign = watching.watch(session, job, spec, held.round, held.stage_id)
    if held.kind is not planning_stage_kind(spec, held.round) or not 0 < held.round < spec.rounds:
        return []

    sizes = round_sizes(session, settings, job)
    if sign is not None and sign.name in spec.stop_when:
        return watching.stop(session, job, spec, sizes, held.round, sign)
    return plan_round(spec, held.round + 1, sizes)


def _release(uow: UnitOfWork, settings: Settings, held: Lease, release: Callable[[Session, Job], None]) -> None:
    """Run `release`, which ends the lease without success, and update the state of the job."""

    def end(session: Session) -> None:
        job = jobs.lock(session, held.job_id)
        release(session, job)
        _update_state(session, job)

    def is_over(session: Session, _result: None) -> bool:
        return not stages.is_held(session, held.stage_id, held.epoch)

    uow.run(end, is_over, settings.lease_seconds)


def round_sizes(session: Session, settings: Settings, job: Job) -> Sizes:
    """The sizes of a round job, which determine the plan of its next round."""
    if job.prompt_set_id is None:
        raise ConflictError(f"{job.id} has no prompt set")

    set_ids = [set_id for set_id in (job.prompt_set_id, job.held_out_prompt_set_id) if set_id is not None]
    prompts = {set_id: prompt_sets.size(session, set_id) for set_id in set_ids}
    measured = measured_splits(job.prompt_set_id, job.held_out_prompt_set_id, prompts)
    return Sizes(settings.shard_prompts, prompts[job.prompt_set_id], measured=measured)


def paused(uow: UnitOfWork, settings: Settings, held: Claim) -> None:
    """Release a stage that stopped for a pause. It continues from its checkpoint when the job is resumed."""
    _stop(uow, settings, held, "stage.paused", "paused")


def give_back(uow: UnitOfWork, settings: Settings, held: Claim) -> None:
    """Release a stage because this worker stops. Another worker can claim it immediately."""
    _stop(uow, settings, held, "stage.given_back", "returned to the queue")


def cancelled(uow: UnitOfWork, settings: Settings, held: Claim) -> None:
    """End a stage that stopped for a cancel."""
    _stop(uow, settings, held, "stage.cancelled", "cancelled")


def _stop(uow: UnitOfWork, settings: Settings, held: Claim, kind: str, outcome: str) -> None:
    """Return a stage to the queue, or end it if a cancel was requested before or after it stopped."""

    def release(session: Session, job: Job) -> None:
        label = _label(session, held)
        if stages.get(session, held.stage_id).cancel_requested_at is not None:
            stages.end(session, held.stage_id, held.epoch, StageState.CANCELLED, "cancelled", "a cancel was requested")
            jobs.add_event(session, job.id, "stage.cancelled", f"{label} cancelled", held.stage_id)
            return

        stages.give_back(session, held.stage_id, held.epoch)
        jobs.add_event(session, job.id, kind, f"{label} {outcome}", held.stage_id)
        hint_free(session, job.id)

    _release(uow, settings, held, release)


def fail(uow: UnitOfWork, settings: Settings, held: Lease, failure: StageFailure) -> None:
    """End a failed attempt. The stage is requeued after a pause if a retry can succeed, otherwise its job fails."""

    def release(session: Session, job: Job) -> None:
        stages.count_failure(session, held.stage_id, held.epoch)
        stage = stages.get(session, held.stage_id)
        failures = stage.failure_count
        _end_attempt(session, settings, job, stage, failure, failures, retry=failures < settings.max_attempts)

    _release(uow, settings, held, release)


def _end_attempt(
    session: Session, settings: Settings, job: Job, stage: Stage, failure: StageFailure, count: int, *, retry: bool
) -> None:
    """End an attempt without success.

    Args:
        session: The transaction.
        settings: Gives the first pause.
        job: The locked row of the job.
        stage: The stage, which is running.
        failure: The reason.
        count: The number of such ends since the last checkpoint. The pause grows with it.
        retry: Whether the stage may be attempted again, if the failure is retryable.
    """
    data = {**_event_data(stage), "code": failure.code}

    # 1. requeue the stage
    if retry and failure.retryable and stage.cancel_requested_at is None:
        pause = min(settings.retry_seconds * 2 ** (count - 1), _MAX_PAUSE_SECONDS)
        pause *= random.uniform(0.5, 1.0)
        stages.requeue(session, stage.id, stage.lease_epoch, pause, failure.code, failure.message)
        jobs.add_event(session, job.id, "stage.retried", failure.message, stage.id, **data, pause_seconds=pause)
        return

    # 2. or end it
    state = StageState.FAILED if stage.cancel_requested_at is None else StageState.CANCELLED
    stages.end(session, stage.id, stage.lease_epoch, state, failure.code, failure.message)
    jobs.add_event(session, job.id, "stage.failed", failure.message, stage.id, **data)
    if state is StageState.CANCELLED:
        return

    # 3. and its job
    stages.cancel_unfinished(session, job.id)
    if jobs.end(session, job.id, JobState.FAILED, failure.code, failure.message):
        jobs.add_event(session, job.id, "job.failed", failure.message, code=failure.code)


def add_stages(
    session: Session, job_id: str, plan: Sequence[PlannedStage], after: int = 0, on_hold: bool = False
) -> None:
    """Insert the planned stages of a job.

    Args:
        session: The transaction.
        job_id: The job.
        plan: The stages.
        after: The number of the job's last stage; the new numbers follow it.
        on_hold: Hold the stages until the job is resumed. Otherwise free stages are hinted after the commit.
    """
    free = stages.add(session, job_id, plan, after)
    if on_hold:
        stages.hold(session, job_id)
    else:
        hint_after_commit(session, free)


def hint_free(session: Session, job_id: str) -> None:
    """After the commit, hint the stages of the job that this transaction has made free."""
    hint_after_commit(session, free_stages.mark_free(session, job_id))


def hint_again(uow: UnitOfWork, queues: Sequence[str] | None = None) -> bool:
    """Hint a free stage after a claim without a result, which has used up a hint. Returns whether there is one."""
    with uow.reading() as session:
        hint = free_stages.free_hint(session, queues)
    if hint is not None:
        uow.queue.hint([hint])
    return hint is not None


def rehint(uow: UnitOfWork, settings: Settings) -> int:
    """Hint free stages whose last hint was long ago, or whose pause has ended. Returns their number.

    If the length of a queue is known, it gets the hints that it lacks: as many as it has free stages, and at most
    MAX_WAITING_HINTS. Those sent since the last sweep may be on their way. If the length is unknown, hints are repeated
    after growing pauses. A transaction marks few stages, so that claims wait for none of them for long.
    """
    hinted = 0
    for queue_name in QueueName:
        with uow.reading() as session:
            free = free_stages.count_free(session, queue_name, MAX_WAITING_HINTS)
        if free == 0:
            continue

        waiting = uow.queue.waiting(queue_name)
        missing = free if waiting is None else free - waiting
        rehint_queue = partial(_rehint, settings=settings, queue_name=queue_name, is_length_known=waiting is not None)
        while missing > 0:
            limit = min(missing, _HINTS_AT_ONCE)
            marked = uow.run(partial(rehint_queue, limit=limit), repeatable)
            hinted += marked
            missing = missing - marked if marked == limit else 0
    return hinted


def _rehint(session: Session, settings: Settings, queue_name: str, limit: int, is_length_known: bool) -> int:
    pause = settings.sweep_seconds if is_length_known else settings.rehint_seconds
    hints = free_stages.mark_hinted(session, pause, queue_name, limit, pause_doubles=not is_length_known)
    hint_after_commit(session, hints)
    return len(hints)


def sweep(uow: UnitOfWork, settings: Settings) -> int:
    """Requeue the stages whose lease has expired. Returns their number."""
    with uow.reading() as session:
        expired = stages.expired(session)
    return sum(_requeue_lost(uow, settings, stage, only_expired=True) for stage in expired)


def count_missed(uow: UnitOfWork) -> int:
    """Include stages in the running sums of their jobs that a process of version 0.1.0 has ended during an upgrade.

    Returns:
        The number of stages.
    """
    with uow.reading() as session:
        job_ids = stages.uncounted_jobs(session, _JOBS_AT_ONCE)
    return sum(uow.run(partial(_count_missed, job_id=job_id), repeatable) for job_id in job_ids)


def _count_missed(session: Session, job_id: str) -> int:
    jobs.lock(session, job_id)
    return stages.count_missed(session, job_id)


def requeue_stages_of(uow: UnitOfWork, settings: Settings, owner_prefix: str) -> int:
    """Requeue the stages of dead workers, whose names start with `owner_prefix`. Returns their number."""
    with uow.reading() as session:
        running = stages.running_under(session, owner_prefix)
    return sum(_requeue_lost(uow, settings, stage, only_expired=False) for stage in running)


def _requeue_lost(uow: UnitOfWork, settings: Settings, lost: Stage, only_expired: bool) -> bool:
    """Requeue the stage of a lost worker. False if its lease was renewed or has ended meanwhile."""

    def release(session: Session) -> bool:
        job = jobs.lock(session, lost.job_id)
        if not stages.count_crash(session, lost.id, lost.lease_epoch, only_expired):
            return False

        stage = stages.get(session, lost.id)
        crashes = stage.crash_count
        message = f"the worker of {_label(session, stage)} was lost (crash {crashes} of at most {settings.max_crashes})"
        failure = StageFailure(WORKER_LOST, message, retryable=True)
        _end_attempt(session, settings, job, stage, failure, crashes, retry=crashes < settings.max_crashes)
        _update_state(session, job)
        return True

    def is_over(session: Session, counted: bool) -> bool:
        return not (counted and stages.is_held(session, lost.id, lost.lease_epoch))

    return uow.run(release, is_over)


def _update_state(session: Session, job: Job) -> None:
    """Set the state of the job if its stages imply one: ended, paused, or waiting for verdicts."""
    states = stages.states_left(session, job.id)

    if not states:
        state = JobState.SUCCEEDED if job.cancel_requested_at is None else JobState.CANCELLED
        if jobs.end(session, job.id, state):
            message = "every stage has succeeded" if state is JobState.SUCCEEDED else "the job is cancelled"
            jobs.add_event(session, job.id, f"job.{state}", message)

    elif job.cancel_requested_at is not None or StageState.RUNNING in states:
        return

    elif job.pause_requested_at is not None:
        _set_state(session, job, JobState.PAUSED, "the job is paused")

    elif stages.waits_for_people(session, job.id):
        if verdicts.any_missing(session, job.id):
            _set_state(session, job, JobState.WAITING, "the job waits for verdicts on its pairs")
        else:  # the last verdict came while the job was paused or another stage was running
            end_review(session, job, "every pair has a verdict")


def _set_state(session: Session, job: Job, state: JobState, message: str) -> None:
    if jobs.become(session, job.id, state):
        jobs.add_event(session, job.id, f"job.{state}", message)


def cancel(session: Session, job_id: str) -> None:
    """Cancel a job: at once if no stage runs, otherwise when its running stages have stopped."""
    job = jobs.lock(session, job_id)
    if JobState(job.state).is_final or job.cancel_requested_at is not None:
        return

    jobs.request_cancel(session, job.id)
    jobs.add_event(session, job.id, "job.cancel_requested", "a cancel was requested")
    stages.cancel_unfinished(session, job.id)
    _update_state(session, jobs.lock(session, job.id))


def pause(session: Session, job_id: str) -> None:
    """Pause a job. No further stage starts; running stages stop within a step and keep their progress.

    Raises:
        ConflictError: The job has ended or is being cancelled.
    """
    job = jobs.lock(session, job_id)
    if JobState(job.state) in FINAL_JOB_STATES or job.cancel_requested_at is not None:
        raise ConflictError(f"{job.id} is {job.state}: only a job that has not ended can be paused")
    if job.pause_requested_at is not None:
        return

    jobs.request_pause(session, job.id)
    jobs.add_event(session, job.id, "job.pause_requested", "a pause was requested")
    stages.hold(session, job.id)
    _update_state(session, jobs.lock(session, job.id))


def resume(session: Session, job_id: str) -> None:
    """Resume a paused job. A review that is due is still due.

    Raises:
        ConflictError: The job is in another state.
    """
    job = jobs.lock(session, job_id)
    if job.pause_requested_at is None or JobState(job.state) in FINAL_JOB_STATES:
        advice = "; skip-review ends its review" if job.state == JobState.WAITING else ""
        raise ConflictError(f"{job.id} is {job.state}: only a paused job can be resumed{advice}")

    jobs.request_resume(session, job.id)
    jobs.add_event(session, job.id, "job.resumed", "the job is resumed")
    hint_after_commit(session, stages.release(session, job.id))
    _update_state(session, jobs.lock(session, job.id))


def skip_review(session: Session, job_id: str) -> None:
    """End the review of a job that waits for verdicts. It continues with the existing ones.

    Raises:
        ConflictError: The job is in another state.
    """
    job = jobs.lock(session, job_id)
    if job.state != JobState.WAITING:
        raise ConflictError(f"{job.id} is {job.state}: only the review of a job that waits for verdicts can be skipped")
    end_review(session, job, "the review was skipped; the job continues with the existing verdicts")


def reopen(session: Session, job_id: str) -> None:
    """Continue a failed or cancelled job with the stages that have not succeeded. The others keep their results.

    Raises:
        ConflictError: The job is in another state, its last stages are still stopping, or it has no stage to continue.
    """
    job = jobs.lock_kept(session, job_id)
    if job.state not in (JobState.FAILED, JobState.CANCELLED):
        raise ConflictError(f"{job.id} is {job.state}: only failed and cancelled jobs can be continued")
    if stages.states_left(session, job.id):
        raise ConflictError(f"{job.id} still has a running stage, which is stopping: try again in a moment")

    count, hints = stages.reopen(session, job.id)
    if count == 0:
        raise ConflictError(f"{job.id} has no stage to continue: retry it as a new job")
    jobs.reopen(session, job.id)
    jobs.add_event(session, job.id, "job.continued", "the job continues with the stages that have not succeeded")
    hint_after_commit(session, hints)
    _update_state(session, jobs.lock(session, job.id))


def end_review(session: Session, job: Job, message: str) -> None:
    """End the review of a job, so that the stages after it can start. The row of the job must be locked."""
    if stages.succeed_reviews(session, job.id):
        jobs.become(session, job.id, JobState.RUNNING)
        jobs.add_event(session, job.id, "review.done", message)
        hint_free(session, job.id)
