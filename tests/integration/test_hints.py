"""When stages are hinted and claimed, on a real database; the queue only records hints."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from service.db.clock import now_seconds
from service.db.queries import stages, workers
from service.db.tables import Stage, Worker
from service.errors import OutcomeUnknownError, StartError
from service.file_lock import file_lock
from service.jobs import execution
from service.jobs.execution import Claim, StageFailure
from service.jobs.kinds import RoundSpec
from service.maintenance import sweep_once
from service.queue import Hint
from service.service import Service, cancel_job, create_job, pause_job, resume_job
from tests.service import PROMPTS, round_body, settings_for
from tests.statements import statements
from worker.child import Child
from worker.stop_flag import StopFlag
from worker.watchdog import Watchdog


class RecordingQueue:
    """A queue that records its hints, and says that it holds as many as it is set to."""

    def __init__(self) -> None:
        self.hints: list[Hint] = []
        self.held: Mapping[str, int | None] = {}

    def hint(self, stages: Sequence[Hint]) -> None:
        self.hints += stages

    def waiting(self, queue_name: str) -> int | None:
        return self.held.get(queue_name, 0)

    def close(self) -> None:
        pass


@pytest.fixture
def queue() -> RecordingQueue:
    return RecordingQueue()


@pytest.fixture
def service(tmp_path: Path, queue: RecordingQueue) -> Iterator[Service]:
    models = {name: str(tmp_path / name) for name in ("tiny", "other")}
    settings = settings_for(tmp_path / "data", tmp_path / "tiny", models=models, sweep_seconds=10)
    opened = Service.open(settings, queue)
    yield opened
    opened.close()


def start(service: Service, **changes: Any) -> str:
    return create_job(service, RoundSpec.model_validate(round_body(**changes)))


def claim(service: Service, **choice: Any) -> Claim | None:
    return execution.claim(service.uow, service.settings, "w", **choice)


def take(service: Service, **choice: Any) -> Claim:
    claimed = claim(service, **choice)
    assert claimed is not None
    return claimed


def finish(service: Service, held: Claim) -> None:
    execution.finish(service.uow, service.settings, held, lambda _session: None)


def new_hints(service: Service, queue: RecordingQueue) -> list[tuple[str, str]]:
    """Return kind and queue of the stages hinted since the last call."""
    with service.uow.reading() as session:
        hints = [(stages.get(session, stage_id).kind, name) for stage_id, name in queue.hints]
    queue.hints.clear()
    return sorted(hints)


def set_back(service: Service, **seconds: float) -> None:
    """Move these timestamps of all stages into the past."""
    with service.uow.writing() as session:
        session.execute(update(Stage).values({name: now_seconds() - ago for name, ago in seconds.items()}))


def test_what_becomes_free_is_hinted_once_and_after_the_commit(service: Service, queue: RecordingQueue) -> None:
    start(service)
    assert new_hints(service, queue) == [("evaluate", "gpu"), ("sample", "gpu"), ("sample", "gpu")]
    _evaluate, first, second = (take(service) for _ in range(3))
    finish(service, first)
    assert new_hints(service, queue) == []
    finish(service, second)
    assert new_hints(service, queue) == [("score", "gpu")]
    score = take(service)
    finish(service, score)
    assert new_hints(service, queue) == [("select", "cpu")]
    select_ = take(service)

    def fail(_session: object) -> None:
        raise RuntimeError("not committed")

    with pytest.raises(RuntimeError):
        execution.finish(service.uow, service.settings, select_, fail)
    assert new_hints(service, queue) == []
    finish(service, select_)
    assert new_hints(service, queue) == [("fuse", "gpu"), ("fuse", "gpu")]


def test_the_next_round_is_hinted(service: Service, queue: RecordingQueue) -> None:
    start(service, rounds=2, evaluation=None)
    while (held := take(service)).kind != "train":
        finish(service, held)
    queue.hints.clear()
    finish(service, held)
    assert new_hints(service, queue) == [("sample", "gpu"), ("sample", "gpu")]


def test_a_round_planned_while_its_job_pauses_is_hinted_on_resume(service: Service, queue: RecordingQueue) -> None:
    job_id = start(service, rounds=2, evaluation=None)
    while (held := take(service)).kind != "train":
        finish(service, held)
    pause_job(service, job_id)
    queue.hints.clear()
    finish(service, held)
    assert new_hints(service, queue) == []
    resume_job(service, job_id)
    assert new_hints(service, queue) == [("sample", "gpu"), ("sample", "gpu")]


def test_a_stage_that_goes_back_is_hinted_again(service: Service, queue: RecordingQueue) -> None:
    start(service)
    held = take(service)
    queue.hints.clear()
    execution.give_back(service.uow, service.settings, held)
    assert new_hints(service, queue) == [(held.kind, "gpu")]


def test_a_stage_that_waits_for_its_next_attempt_is_hinted_when_it_is_due(
    service: Service, queue: RecordingQueue
) -> None:
    start(service)
    held = take(service)
    queue.hints.clear()
    execution.fail(service.uow, service.settings, held, StageFailure("storage", "away", retryable=True))
    assert new_hints(service, queue) == []
    with service.uow.writing() as session:
        stages.get(session, held.stage_id).not_before = 0.0
    assert execution.rehint(service.uow, service.settings) == 1
    assert new_hints(service, queue) == [(held.kind, "gpu")]


def test_what_was_free_from_the_start_is_hinted_again_when_its_pause_is_over(
    service: Service, queue: RecordingQueue
) -> None:
    start(service, evaluation=None)
    queue.hints.clear()
    assert execution.rehint(service.uow, service.settings) == 0
    with service.uow.writing() as session:
        session.execute(update(Stage).values(free_at=Stage.free_at - 61, hinted_at=Stage.hinted_at - 61))
    assert execution.rehint(service.uow, service.settings) == 2
    assert new_hints(service, queue) == [("sample", "gpu"), ("sample", "gpu")]


@pytest.mark.parametrize(
    ("free_seconds_ago", "hinted_seconds_ago", "due"),
    [
        (59, 59, False),  # hinted when it became free: 60 s
        (61, 61, True),
        (110, 50, False),  # hinted again at 60 s: again 60 s
        (121, 61, True),
        (230, 110, False),  # at 120 s: 120 s
        (241, 121, True),
        (100_000, 950, False),  # at most 16 times 60 s
        (100_000, 970, True),
    ],
)
def test_pauses_between_hints_double(
    service: Service, queue: RecordingQueue, free_seconds_ago: float, hinted_seconds_ago: float, due: bool
) -> None:
    start(service, evaluation=None)
    queue.hints.clear()
    set_back(service, free_at=free_seconds_ago, hinted_at=hinted_seconds_ago)
    queue.held = {"gpu": None, "cpu": None}  # its length is unknown
    again = execution.rehint(service.uow, service.settings)
    assert again == (2 if due else 0)  # the two samplings; what waits for them is not free
    assert new_hints(service, queue) == [("sample", "gpu")] * again
    assert execution.rehint(service.uow, service.settings) == 0


@pytest.mark.parametrize(("held", "repeated"), [({"gpu": 2}, 0), ({"gpu": 3}, 0), ({"gpu": 1}, 1), ({"cpu": 9}, 2)])
def test_hints_are_not_repeated_while_the_queue_holds_as_many(
    service: Service, queue: RecordingQueue, held: dict[str, int], repeated: int
) -> None:
    start(service, evaluation=None)  # two free stages
    set_back(service, free_at=61, hinted_at=61)
    queue.hints.clear()
    queue.held = held
    assert execution.rehint(service.uow, service.settings) == repeated
    assert new_hints(service, queue) == [("sample", "gpu")] * repeated
    queue.held = {}
    assert execution.rehint(service.uow, service.settings) == 2 - repeated  # the others are still due


def test_an_empty_queue_gets_its_hints_again_however_long_their_pause(service: Service, queue: RecordingQueue) -> None:
    """Its Redis was flushed, or a worker without disk space used them up."""
    start(service, evaluation=None)
    set_back(service, free_at=7200, hinted_at=900)
    queue.hints.clear()
    assert execution.rehint(service.uow, service.settings) == 2
    assert execution.rehint(service.uow, service.settings) == 0  # they may be on their way
    set_back(service, hinted_at=11)
    assert execution.rehint(service.uow, service.settings) == 2


def test_hints_are_repeated_if_the_length_of_the_queue_is_unknown(service: Service, queue: RecordingQueue) -> None:
    start(service, evaluation=None)
    set_back(service, free_at=61, hinted_at=61)
    queue.held = {"gpu": None}
    assert execution.rehint(service.uow, service.settings) == 2


def test_a_queue_never_gets_more_repeated_hints_than_it_may_hold(
    service: Service, queue: RecordingQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "MAX_WAITING_HINTS", 3)
    for _ in range(3):
        start(service, evaluation=None)
    set_back(service, free_at=61, hinted_at=61)
    queue.held = {"gpu": 1}
    assert execution.rehint(service.uow, service.settings) == 2


def test_hints_are_repeated_in_transactions_of_few_stages(
    service: Service, queue: RecordingQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "_HINTS_AT_ONCE", 2)
    for _ in range(3):
        start(service, evaluation=None)  # two free stages each
    start(service, evaluation=None, prompts=PROMPTS[:1])  # one
    set_back(service, free_at=61, hinted_at=61)
    queue.hints.clear()
    with statements(service.uow.engine) as seen:
        assert execution.rehint(service.uow, service.settings) == 7
    assert len(set(queue.hints)) == 7
    assert [text for text, _ in seen].count("BEGIN IMMEDIATE") == 4


@pytest.fixture
def child(service: Service, queue: RecordingQueue) -> Iterator[Child]:
    opened = Child(service.settings, "w", ("gpu", "cpu"), StopFlag(), Watchdog(service.settings))
    opened._queue = opened.service.uow.queue = queue
    yield opened
    opened.service.close()


def test_a_worker_that_finds_nothing_while_something_is_free_hints_again(
    service: Service, queue: RecordingQueue, child: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = start(service, evaluation=None)
    free = list(queue.hints)
    queue.hints.clear()
    monkeypatch.setattr(execution, "_SEARCHES", 0)  # other workers are always faster

    assert child.take_hint("stg_late", "gpu")
    assert queue.hints[0] in free and len(queue.hints) == 1

    queue.hints.clear()
    cancel_job(service, job_id)
    assert child.take_hint("stg_late", "gpu")
    assert queue.hints == []


def test_a_hint_is_sent_again_if_the_database_fails(service: Service, queue: RecordingQueue, child: Child) -> None:
    assert child.bench is not None
    with service.uow.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE stages RENAME TO lost")
    with pytest.raises(DBAPIError):
        child.take_hint("stg_first", "gpu")
    assert queue.hints == [("stg_first", "gpu")]


@pytest.mark.parametrize("error", [PoolTimeoutError(), OutcomeUnknownError("lost"), StartError("no database")])
def test_a_hint_is_sent_again_whatever_fails_before_the_claim(
    queue: RecordingQueue, child: Child, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_arguments: object) -> None:
        raise error

    monkeypatch.setattr(execution, "claim", fail)
    with pytest.raises(type(error)):
        child.take_hint("stg_first", "gpu")
    assert queue.hints == [("stg_first", "gpu")]


def test_a_worker_asks_for_its_model_only_while_it_prefers_it(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    preferences = []
    monkeypatch.setattr(execution, "claim", lambda *arguments: preferences.append(arguments[-1]))
    for preferred in ("tiny", None):
        child.__dict__["bench"] = SimpleNamespace(models=SimpleNamespace(loaded="tiny", preferred=preferred))
        assert child.take_hint("stg_first", "gpu")
    assert preferences == ["tiny", None]


def test_a_stopping_worker_forwards_its_hint(
    service: Service, queue: RecordingQueue, child: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(service, evaluation=None)
    queue.hints.clear()
    stop = StopFlag()
    stop.set()
    monkeypatch.setattr(child, "_stop", stop)
    assert child.take_hint("stg_first", "gpu")
    assert queue.hints == [("stg_first", "gpu")]


def test_a_worker_takes_only_from_its_queues(service: Service) -> None:
    start(service, evaluation=None)
    assert claim(service, queues=("cpu",)) is None
    for _ in range(3):
        finish(service, take(service, queues=("gpu",)))
    assert claim(service, queues=("gpu",)) is None
    assert take(service, queues=("cpu",)).kind == "select"


def test_stages_on_the_preferred_model_come_first(service: Service) -> None:
    first, second = start(service, evaluation=None), start(service, evaluation=None, model="other")
    assert take(service).job_id == first
    assert take(service, prefer_base="other").job_id == second
    assert take(service, prefer_base="a third").job_id == first


def test_one_sweeper_sweeps_at_a_time(service: Service, queue: RecordingQueue) -> None:
    start(service, evaluation=None)
    set_back(service, free_at=61, hinted_at=61)
    queue.hints.clear()
    with file_lock(service.settings.data_dir / "sweeper.lock"):
        assert sweep_once(service) is False
    assert queue.hints == []
    assert sweep_once(service) is True
    assert len(queue.hints) == 2


def test_the_sweeper_frees_what_a_silent_worker_held(service: Service) -> None:
    start(service)
    held = take(service)
    with service.uow.writing() as session:
        stages.get(session, held.stage_id).lease_expires_at = 0.0
    sweep_once(service)
    with service.uow.reading() as session:
        assert (stages.get(session, held.stage_id).state, stages.get(session, held.stage_id).crash_count) == (
            "queued",
            1,
        )


def report(service: Service, name: str, pid: int) -> None:
    with service.uow.writing() as session:
        workers.report(session, name=name, host="h", pid=pid, queues=["gpu"], device="cpu", model=None)


def test_a_worker_is_one_row_that_a_new_process_takes_over(service: Service) -> None:
    report(service, "one", 1)
    with service.uow.writing() as session:
        session.execute(update(Worker).values(started_at=5.0, seen_at=5.0))
    report(service, "one", 1)
    with service.uow.reading() as session:
        (row,) = workers.all_workers(session)
        assert row.started_at == 5.0
        assert row.seen_at > 5.0
    report(service, "one", 2)
    with service.uow.reading() as session:
        (row,) = workers.all_workers(session)
        assert (row.pid, row.started_at > 5.0) == (2, True)


def test_a_worker_that_was_not_seen_for_a_day_is_forgotten(service: Service) -> None:
    report(service, "old", 1)
    report(service, "new", 2)
    for name, ago in (("old", 86_401), ("new", 86_399 - 60)):
        with service.uow.writing() as session:
            session.execute(update(Worker).where(Worker.name == name).values(seen_at=now_seconds() - ago))
    sweep_once(service)
    with service.uow.reading() as session:
        assert list(session.scalars(select(Worker.name))) == ["new"]
