"""Claims, leases and results of stages on a real database, without running stages."""

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.db.queries import jobs, stages
from service.db.queries.stages import StopRequest
from service.db.tables import Artifact, Job, Stage
from service.errors import (
    AlreadyRunningError,
    ConflictError,
    IdempotencyError,
    InvalidRequestError,
    LeaseLostError,
    StageCancelledError,
    TooManyJobsError,
)
from service.file_lock import file_lock
from service.jobs import execution
from service.jobs.execution import Claim, StageFailure
from service.jobs.kinds import RoundSpec, SamplingJobSpec
from service.queue import Hint, SilentQueue
from service.service import (
    Service,
    cancel_job,
    continue_job,
    create_job,
    pause_job,
    raise_rounds,
    resume_job,
    retry_job,
)
from service.states import JobState
from service.storage import StoredObject
from tests.service import PROMPTS, round_body, settings_for


@pytest.fixture
def service(tmp_path: Path, database_url: str) -> Iterator[Service]:
    opened = Service.open(settings_for(tmp_path / "data", tmp_path / "tiny", database_url=database_url))
    yield opened
    opened.close()


class Recording(SilentQueue):
    """A queue that records hinted stages."""

    def __init__(self, hinted: list[str]) -> None:
        self._hinted = hinted

    def hint(self, stages: Sequence[Hint]) -> None:
        self._hinted += [stage_id for stage_id, _ in stages]


def start(service: Service, **changes: Any) -> str:
    return create_job(service, RoundSpec.model_validate(round_body(**changes)))


def claim(service: Service, owner: str = "w") -> Claim | None:
    return execution.claim(service.uow, service.settings, owner)


def take(service: Service, owner: str = "w") -> Claim:
    claimed = claim(service, owner)
    assert claimed is not None
    return claimed


def finish(service: Service, held: Claim) -> None:
    execution.finish(service.uow, service.settings, held, lambda _session: None)


def job_of(service: Service, job_id: str) -> Job:
    with service.uow.reading() as session:
        return jobs.get(session, job_id)


def stage_of(service: Service, held: Claim) -> Stage:
    with service.uow.reading() as session:
        return stages.get(session, held.stage_id)


def expire(service: Service, held: Claim) -> None:
    with service.uow.writing() as session:
        stages.get(session, held.stage_id).lease_expires_at = 0.0


def test_stages_are_claimed_in_order_once_what_they_need_is_done(service: Service) -> None:
    job_id = start(service)
    first = [take(service) for _ in range(3)]
    assert [claimed.kind for claimed in first] == ["evaluate", "sample", "sample"]
    assert claim(service) is None  # score needs both samples
    finish(service, first[1])
    assert claim(service) is None
    finish(service, first[2])
    assert take(service).kind == "score"
    assert job_of(service, job_id).state == "running"


def test_a_job_succeeds_with_its_last_stage_and_rounds_follow_each_other(service: Service) -> None:
    job_id = start(service, rounds=2)
    done = []
    while (held := claim(service)) is not None:
        done.append((held.round, held.kind.value))
        finish(service, held)
    assert [kind for number, kind in done if number == 2] == [kind for number, kind in done if number == 1]
    assert done[-1] == (2, "compare")
    assert job_of(service, job_id).state == "succeeded"


def messages(service: Service, job_id: str) -> list[str]:
    with service.uow.reading() as session:
        return [event.message for event in jobs.events(session, job_id, 100, None).rows]


def test_the_log_names_shards_where_there_are_several(service: Service) -> None:
    job_id = start(service, rounds=2)  # 3 prompts in shards of 2, measured together
    while (held := claim(service)) is not None:
        finish(service, held)
    written = messages(service, job_id)
    assert written[1:3] == ["evaluate of round 0 started", "evaluate of round 0 done"]
    assert written[5:9] == [
        "sample of round 1, shard 1 of 2 started",
        "sample of round 1, shard 1 of 2 done",
        "sample of round 1, shard 2 of 2 started",
        "sample of round 1, shard 2 of 2 done",
    ]
    assert "train of round 1 done" in written and "fuse of round 2, shard 2 of 2 started" in written


def test_the_log_names_the_shard_that_stops_and_its_further_attempts(service: Service) -> None:
    job_id = start(service)
    held = [take(service) for _ in range(3)][-1]  # evaluate and two shards of sample
    execution.fail(service.uow, service.settings, held, StageFailure("x", "out of luck", True))
    again = _claim_again(service, held)
    execution.give_back(service.uow, service.settings, again)
    assert messages(service, job_id)[-3:] == [
        "out of luck",
        "sample of round 1, shard 2 of 2 started, attempt 2",
        "sample of round 1, shard 2 of 2 returned to the queue",
    ]


def test_workers_that_claim_at_once_never_share_a_stage(service: Service) -> None:
    for seed in range(4):
        start(service, seed=seed)
    claimed: list[str] = []

    def work(name: str) -> None:
        while (held := claim(service, name)) is not None:
            claimed.append(held.stage_id)

    threads = [threading.Thread(target=work, args=(f"w{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) == len(set(claimed)) == 4 * 3  # evaluate and two sample shards of each job


def test_nothing_is_written_under_an_old_epoch(service: Service) -> None:
    start(service)
    old = take(service, "slow")
    expire(service, old)
    assert execution.sweep(service.uow, service.settings) == 1
    new = _claim_again(service, old)
    assert new.epoch == old.epoch + 1
    written: list[str] = []
    for late in (
        lambda: execution.finish(service.uow, service.settings, old, lambda _s: written.append("row")),
        lambda: execution.renew_lease(service.uow, service.settings, old, 1, 2),
        lambda: execution.fail(service.uow, service.settings, old, StageFailure("x", "x", False)),
        lambda: execution.give_back(service.uow, service.settings, old),
        lambda: execution.cancelled(service.uow, service.settings, old),
        lambda: execution.note(service.uow, service.settings, old, "x", "x"),
    ):
        with pytest.raises(LeaseLostError):
            late()
    assert written == []
    assert stage_of(service, new).state == "running"
    finish(service, new)


def _claim_again(service: Service, lost: Claim) -> Claim:
    """Claim the lost stage again after its pause."""
    for _ in range(200):
        held = claim(service)
        if held is not None and held.stage_id == lost.stage_id:
            return held
        threading.Event().wait(0.01)
    raise AssertionError("the stage was not queued again")


def test_a_stage_has_one_output_in_a_slot(service: Service) -> None:
    """A database constraint rejects the second output."""
    job_id = start(service)
    held = take(service)

    def write(session: Session, name: str, slot: str) -> None:
        session.add(
            Artifact(
                id=name,
                job_id=job_id,
                stage_id=held.stage_id,
                slot=slot,
                key=name,
                sha256="",
                size_bytes=1,
                media_type="image/png",
                created_at=0.0,
            )
        )

    with service.uow.writing() as session:
        write(session, "art_1", "image-0")
        write(session, "art_2", "image-1")
    with pytest.raises(IntegrityError), service.uow.writing() as session:
        write(session, "art_3", "image-0")


def test_what_a_stage_made_is_not_seen_if_its_end_fails(service: Service) -> None:
    job_id = start(service)
    held = take(service)

    def record(session: Session) -> None:
        jobs.add_event(session, job_id, "made", "half of it")
        session.flush()
        raise RuntimeError("the other half fails")

    with pytest.raises(RuntimeError):
        execution.finish(service.uow, service.settings, held, record)
    with service.uow.reading() as session:
        assert "made" not in [event.kind for event in jobs.events(session, job_id, 100, None).rows]
    assert stage_of(service, held).state == "running"


def test_a_stage_whose_workers_keep_dying_fails_its_job(service: Service) -> None:
    job_id = start(service)
    held = take(service)
    for crash in (1, 2, 3):
        expire(service, held)
        assert execution.sweep(service.uow, service.settings) == 1
        assert stage_of(service, held).crash_count == crash
        if crash < 3:
            held = _claim_again(service, held)
    job = job_of(service, job_id)
    assert (job.state, job.error_code) == ("failed", "worker_lost")
    with service.uow.reading() as session:
        left = {stage.state for stage in stages.of_job(session, job_id)}
    assert left <= {"failed", "cancelled", "running"}
    assert execution.sweep(service.uow, service.settings) == 0


def test_dead_workers_stages_are_queued_at_once(service: Service) -> None:
    start(service)
    held = take(service, "embedded-1.")
    assert execution.requeue_stages_of(service.uow, service.settings, "embedded-2.") == 0
    assert execution.requeue_stages_of(service.uow, service.settings, "embedded-1.") == 1
    assert _claim_again(service, held).attempt == 2


def test_passing_failures_are_tried_again_and_others_are_not(service: Service) -> None:
    job_id = start(service)
    held = take(service)
    execution.fail(service.uow, service.settings, held, StageFailure("storage", "away", retryable=True))
    assert stage_of(service, held).state == "queued"
    again = _claim_again(service, held)
    assert again.attempt == 2
    execution.fail(service.uow, service.settings, again, StageFailure("non_finite", "loss became nan", retryable=False))
    job = job_of(service, job_id)
    assert (job.state, job.error_code, job.error_message) == ("failed", "non_finite", "loss became nan")


def fail(service: Service, held: Claim) -> None:
    execution.fail(service.uow, service.settings, held, StageFailure("storage", "unavailable", retryable=True))


def lose(service: Service, held: Claim) -> None:
    expire(service, held)
    assert execution.sweep(service.uow, service.settings) == 1


def give_back(service: Service, held: Claim) -> None:
    execution.give_back(service.uow, service.settings, held)


def cancelled(service: Service, held: Claim) -> None:
    execution.cancelled(service.uow, service.settings, held)


def keep_checkpoint(service: Service, held: Claim) -> None:
    execution.checkpoint(service.uow, service.settings, held, StoredObject("key", "0" * 64, 1))


def claim_without_pause(service: Service, held: Claim) -> Claim:
    """Claim the stage again, without the pause after its last attempt."""
    with service.uow.writing() as session:
        stages.get(session, held.stage_id).not_before = 0.0
    return _claim_again(service, held)


def fail_seven_times(service: Service) -> Claim:
    """Fail the first stage in seven attempts. Returns the claim of the eighth, which is the last by default."""
    held = take(service)
    for _ in range(7):
        fail(service, held)
        held = claim_without_pause(service, held)
    return held


def test_a_transient_failure_that_never_passes_fails_the_job(service: Service) -> None:
    job_id = start(service)
    held = fail_seven_times(service)
    assert job_of(service, job_id).state == "running"
    fail(service, held)
    assert job_of(service, job_id).state == "failed"


def test_lost_workers_do_not_count_as_failures(service: Service) -> None:
    """Eight workers are lost, each after a checkpoint. The first failure after them is not the ninth."""
    job_id = start(service)
    held = take(service)
    for _ in range(8):
        keep_checkpoint(service, held)
        lose(service, held)
        held = claim_without_pause(service, held)
    fail(service, held)
    row = stage_of(service, held)
    assert (row.state, row.attempt, row.crash_count, row.failure_count) == ("queued", 9, 1, 1)
    assert job_of(service, job_id).state == "running"


def test_a_checkpoint_resets_the_count_of_failures(service: Service) -> None:
    job_id = start(service)
    held = fail_seven_times(service)
    keep_checkpoint(service, held)
    fail(service, held)
    assert (stage_of(service, held).failure_count, job_of(service, job_id).state) == (1, "running")


def test_a_cancel_wins_over_an_end_that_comes_later(service: Service) -> None:
    job_id = start(service)
    held = take(service)
    cancel_job(service, job_id)
    assert job_of(service, job_id).state == "cancelling"
    assert execution.renew_lease(service.uow, service.settings, held, 0, 1) is StopRequest.CANCEL
    with pytest.raises(StageCancelledError):
        finish(service, held)
    execution.cancelled(service.uow, service.settings, held)
    assert job_of(service, job_id).state == "cancelled"
    assert claim(service) is None


def test_an_end_wins_over_a_cancel_that_comes_later(service: Service) -> None:
    job_id = start(service)
    while (held := claim(service)) is not None:
        finish(service, held)
    cancel_job(service, job_id)
    assert job_of(service, job_id).state == "succeeded"


def test_a_cancelled_job_whose_worker_is_lost_is_cancelled(service: Service) -> None:
    job_id = start(service)
    held = take(service)
    cancel_job(service, job_id)
    expire(service, held)
    execution.sweep(service.uow, service.settings)
    assert job_of(service, job_id).state == "cancelled"


def test_a_given_back_stage_counts_no_crash_and_no_attempt(service: Service) -> None:
    start(service)
    held = take(service)
    for _ in range(3):
        execution.give_back(service.uow, service.settings, held)
        again = take(service)
        assert again.stage_id == held.stage_id
        held = again
    assert (stage_of(service, held).crash_count, held.attempt) == (0, 1)


def test_one_service_has_the_data_folder(tmp_path: Path) -> None:
    with (
        file_lock(tmp_path / "lock"),
        pytest.raises(AlreadyRunningError, match="another process holds"),
        file_lock(tmp_path / "lock"),
    ):
        pass
    with file_lock(tmp_path / "lock"):
        pass


def test_a_paused_job_stops_and_resumes(service: Service) -> None:
    job_id = start(service)
    held = take(service)
    pause_job(service, job_id)
    assert job_of(service, job_id).state == "pausing"
    assert execution.renew_lease(service.uow, service.settings, held, 0, 1) is StopRequest.PAUSE
    execution.paused(service.uow, service.settings, held)
    assert (job_of(service, job_id).state, claim(service)) == ("paused", None)
    resume_job(service, job_id)
    assert job_of(service, job_id).state == "running"
    again = take(service)
    assert (again.stage_id, again.attempt) == (held.stage_id, 1)


def test_a_stage_that_ends_while_its_job_is_pausing_is_not_lost(service: Service) -> None:
    job_id = start(service, rounds=2, evaluation=None)
    while (held := take(service)).kind != "train":
        finish(service, held)
    pause_job(service, job_id)
    finish(service, held)  # plans round 2
    assert (job_of(service, job_id).state, claim(service)) == ("paused", None)
    resume_job(service, job_id)
    assert (take(service).round, job_of(service, job_id).state) == (2, "running")


@pytest.mark.parametrize("end", [fail, lose, give_back])
def test_a_pausing_job_is_paused_however_its_attempt_ends(service: Service, end: Callable[..., None]) -> None:
    job_id = start(service)
    held = take(service)
    pause_job(service, job_id)
    end(service, held)
    assert (job_of(service, job_id).state, claim(service)) == ("paused", None)
    resume_job(service, job_id)
    assert stage_of(service, held).state == "queued"


@pytest.mark.parametrize("end", [fail, lose, give_back])
def test_a_cancelling_job_is_cancelled_however_its_attempt_ends(service: Service, end: Callable[..., None]) -> None:
    job_id = start(service)
    held = take(service)
    cancel_job(service, job_id)
    end(service, held)
    assert job_of(service, job_id).state == "cancelled"


@pytest.mark.parametrize("end", [fail, lose, give_back, cancelled])
def test_what_still_runs_when_its_job_fails_is_not_queued_again(service: Service, end: Callable[..., None]) -> None:
    job_id = start(service)
    failing, running = take(service), take(service)
    execution.fail(service.uow, service.settings, failing, StageFailure("non_finite", "nan", retryable=False))
    end(service, running)
    assert (stage_of(service, running).state, job_of(service, job_id).state) == ("cancelled", "failed")
    assert claim(service) is None


def test_a_cancel_after_the_stage_stopped_for_a_pause_ends_the_job(service: Service) -> None:
    job_id = start(service)
    held = take(service)
    pause_job(service, job_id)
    cancel_job(service, job_id)
    execution.paused(service.uow, service.settings, held)
    assert (stage_of(service, held).state, job_of(service, job_id).state) == ("cancelled", "cancelled")


def test_what_has_ended_can_neither_be_paused_nor_resumed(service: Service) -> None:
    job_id = start(service)
    with pytest.raises(ConflictError, match="queued"):
        resume_job(service, job_id)
    cancel_job(service, job_id)
    with pytest.raises(ConflictError, match="cancelled"):
        pause_job(service, job_id)


def test_a_retry_is_a_new_job_that_names_its_origin(service: Service) -> None:
    job_id = start(service, seed=11)
    with pytest.raises(ConflictError, match="queued"):
        retry_job(service, job_id)
    cancel_job(service, job_id)
    first, again = job_of(service, job_id), job_of(service, retry_job(service, job_id))
    assert (again.origin_id, again.state) == (job_id, "queued")
    assert again.spec == first.spec | {"model": first.model_id}  # the id behind the name at creation


def run_until(service: Service, kind: str) -> Claim:
    """Finish stages until one of this kind is claimed."""
    while (held := take(service)).kind != kind:
        finish(service, held)
    return held


def test_a_failed_job_continues_with_what_has_not_succeeded(service: Service) -> None:
    job_id = start(service, rounds=2)
    held = run_until(service, "train")
    with service.uow.reading() as session:
        succeeded = {stage.id for stage in stages.of_job(session, job_id) if stage.state == "succeeded"}
    execution.fail(service.uow, service.settings, held, StageFailure("non_finite", "nan", retryable=False))
    assert job_of(service, job_id).state == "failed"

    continue_job(service, job_id)
    job = job_of(service, job_id)
    assert (job.state, job.error_code, job.finished_at) == ("running", None, None)
    done = []
    while (held := claim(service)) is not None:
        done.append((held.round, held.kind.value, held.attempt))
        assert held.stage_id not in succeeded
        finish(service, held)
    assert done[0] == (1, "train", 2)
    assert {number for number, _, _ in done} == {1, 2}
    assert job_of(service, job_id).state == "succeeded"


def test_a_cancelled_job_continues_and_its_review_waits_again(service: Service) -> None:
    job_id = start(service, review=True)
    finish(service, take(service))
    cancel_job(service, job_id)
    assert job_of(service, job_id).state == "cancelled"
    continue_job(service, job_id)
    with service.uow.reading() as session:
        states = {stage.kind: stage.state for stage in stages.of_job(session, job_id)}
    assert (states["review"], states["sample"], states["train"]) == ("waiting", "queued", "queued")
    assert run_until(service, "verify").attempt == 1


def test_a_job_that_did_not_fail_or_is_still_stopping_cannot_continue(service: Service) -> None:
    job_id = start(service)
    with pytest.raises(ConflictError, match="queued: only failed and cancelled"):
        continue_job(service, job_id)
    failing, running = take(service), take(service)
    execution.fail(service.uow, service.settings, failing, StageFailure("non_finite", "nan", retryable=False))
    with pytest.raises(ConflictError, match="still has a running stage"):
        continue_job(service, job_id)
    cancelled(service, running)
    continue_job(service, job_id)
    assert job_of(service, job_id).state == "running"


def rest(service: Service, job_id: str, seconds: float) -> None:
    """The job, which rests, has rested for this time."""
    with service.uow.writing() as session:
        job = jobs.get(session, job_id)
        assert job.rest_since is not None
        job.rest_since -= seconds


def wait_and_skip(service: Service, job_id: str) -> None:
    """The job waits for verdicts for 1000 seconds, then its review is skipped."""
    with service.uow.writing() as session:
        assert jobs.become(session, job_id, JobState.WAITING)
    rest(service, job_id, 1000)
    with service.uow.writing() as session:
        assert jobs.become(session, job_id, JobState.RUNNING)


def pause_and_resume(service: Service, job_id: str) -> None:
    pause_job(service, job_id)
    rest(service, job_id, 1000)
    resume_job(service, job_id)


def pause_cancel_and_continue(service: Service, job_id: str) -> None:
    """The job is cancelled while it is paused, and rests from the pause on."""
    pause_job(service, job_id)
    rest(service, job_id, 400)
    cancel_job(service, job_id)
    rest(service, job_id, 600)
    continue_job(service, job_id)


def run_and_extend(service: Service, job_id: str) -> None:
    run_all(service)
    rest(service, job_id, 1000)
    raise_rounds(service, job_id, 2)


@pytest.mark.parametrize("end", [wait_and_skip, pause_and_resume, pause_cancel_and_continue, run_and_extend])
def test_the_time_in_which_a_job_rests_is_counted(service: Service, end: Callable[[Service, str], None]) -> None:
    """The remaining time is estimated from the rest of the time since the start."""
    job_id = start(service, evaluation=None)
    pause_job(service, job_id)  # before its start, which does not count
    rest(service, job_id, 5000)
    resume_job(service, job_id)
    finish(service, take(service))
    assert job_of(service, job_id).rest_seconds == 0
    end(service, job_id)
    job = job_of(service, job_id)
    assert job.rest_since is None and 1000 <= job.rest_seconds < 1200


def run_all(service: Service) -> list[tuple[int, str]]:
    """Finish all stages. Returns their rounds and kinds."""
    done = []
    while (held := claim(service)) is not None:
        done.append((held.round, held.kind.value))
        finish(service, held)
    return done


@pytest.mark.parametrize("every_round", [True, False])
def test_a_job_with_raised_rounds_runs_the_further_ones(service: Service, every_round: bool) -> None:
    evaluation = {"every_round": every_round}
    job_id = start(service, rounds=1, evaluation=evaluation)
    run_all(service)
    for _ in range(2):  # the second request finds the work done
        raise_rounds(service, job_id, 3)
    assert (job_of(service, job_id).state, job_of(service, job_id).finished_at) == ("running", None)

    done = run_all(service)
    assert [number for number, kind in done if kind == "train"] == [2, 3]
    assert [number for number, kind in done if kind == "compare"] == ([2, 3] if every_round else [3])
    job = job_of(service, job_id)
    assert (job.state, job.rounds, job.spec["rounds"], job.work_done) == ("succeeded", 3, 3, job.work_total)
    raise_rounds(service, job_id, 3)
    assert job_of(service, job_id).state == "succeeded"


def test_rounds_are_raised_of_succeeded_round_jobs_alone_and_within_the_limits(service: Service) -> None:
    job_id = start(service, rounds=2)
    with pytest.raises(ConflictError, match="queued: only the rounds of a job that has succeeded"):
        raise_rounds(service, job_id, 3)
    raise_rounds(service, job_id, 2)
    run_all(service)
    with pytest.raises(InvalidRequestError, match="expected at least the 2 rounds of the job, got 1") as error:
        raise_rounds(service, job_id, 1)
    assert [problem.pointer for problem in error.value.problems] == ["/rounds"]

    stages_of_job = len(stages_of(service, job_id))
    limits = service.settings.model_copy(update={"max_stages_per_job": stages_of_job + 1})
    limited = Service(limits, service.uow, service.store, service.catalogue)
    with pytest.raises(InvalidRequestError, match="DFUSION_MAX_STAGES_PER_JOB") as error:
        raise_rounds(limited, job_id, 3)
    assert [problem.pointer for problem in error.value.problems] == ["/rounds"]

    body = {"model": "tiny", "prompts": PROMPTS, "samples_per_prompt": 2}
    sampling = create_job(service, SamplingJobSpec.model_validate(body))
    with pytest.raises(ConflictError, match="is a sampling job"):
        raise_rounds(service, sampling, 2)


def stages_of(service: Service, job_id: str) -> list[Stage]:
    with service.uow.reading() as session:
        return stages.of_job(session, job_id)


def test_the_priority_is_no_part_of_an_idempotent_request(service: Service) -> None:
    """Keys of requests from before priorities existed stay valid, and a changed priority repeats no work."""
    first = create_job(service, RoundSpec.model_validate(round_body()), "key")
    assert create_job(service, RoundSpec.model_validate(round_body(priority=5)), "key") == first
    with pytest.raises(IdempotencyError):
        create_job(service, RoundSpec.model_validate(round_body(seed=8)), "key")


def test_what_was_paused_is_hinted_again_when_it_is_resumed(service: Service) -> None:
    hinted: list[str] = []
    service.uow.queue = Recording(hinted)
    job_id = start(service)
    at_first = set(hinted)
    pause_job(service, job_id)
    hinted.clear()
    resume_job(service, job_id)
    assert set(hinted) == at_first != set()


def test_paused_jobs_count_among_the_queued(service: Service) -> None:
    limited = Service(
        service.settings.model_copy(update={"max_queued_jobs": 2}), service.uow, service.store, service.catalogue
    )
    for _ in range(2):
        pause_job(limited, start(limited))
    with pytest.raises(TooManyJobsError):
        start(limited)


def test_one_key_for_two_retries_is_refused(service: Service) -> None:
    first, second = start(service, seed=1), start(service, seed=1)
    for job_id in (first, second):
        cancel_job(service, job_id)
    again = retry_job(service, first, "key")
    assert retry_job(service, first, "key") == again
    with pytest.raises(IdempotencyError):
        retry_job(service, second, "key")
