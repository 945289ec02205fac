"""The timeline shows every attempt of a stage, and who made it."""

from typing import Any

from api.pages.timeline import timeline
from api.wire.common import ListOut
from api.wire.jobs import StageOut
from service.db.tables import Event


def stage(**changes: Any) -> StageOut:
    values: dict[str, Any] = {
        "id": "stg_a",
        "kind": "train",
        "queue": "gpu",
        "round": 1,
        "shard": 0,
        "state": "succeeded",
        "worker": None,
        "done": 1,
        "total": 1,
        "attempts": 2,
        "crashes": 0,
        "failures": 1,
        "started_at": "1970-01-01T00:00:50Z",
        "finished_at": "1970-01-01T00:01:40Z",
        "error": None,
    }
    return StageOut.model_validate(values | changes)


def event(kind: str, at: float, message: str = "", **data: Any) -> Event:
    return Event(stage_id="stg_a", kind=kind, at=at, message=message, data=data)


def page(*stages: StageOut) -> ListOut[StageOut]:
    return ListOut[StageOut](data=list(stages), has_more=False, next_cursor=None)


def test_each_attempt_has_its_worker_and_its_end() -> None:
    events = [
        event("stage.started", 0, worker="gpu-1"),
        event("stage.retried", 30, "out of memory", code="out_of_memory"),
        event("stage.started", 50, worker="gpu-2"),
        event("stage.succeeded", 100),
    ]
    [row] = timeline(page(stage()), events, 500).rows
    assert [(a.worker, a.outcome, a.seconds, a.message) for a in row.attempts] == [
        ("gpu-1", "failed", 30, "out of memory"),
        ("gpu-2", "succeeded", 50, ""),
    ]
    assert [(a.x, a.width) for a in row.attempts] == [(0, 300), (500, 500)]
    assert row.workers == "gpu-1, gpu-2"


def test_a_running_attempt_ends_now() -> None:
    [row] = timeline(page(stage(state="running")), [event("stage.started", 10, worker="w")], 25).rows
    assert [(a.outcome, a.seconds) for a in row.attempts] == [("running", 15)]


def test_without_events_the_row_shows_the_last_attempt() -> None:
    [row] = timeline(page(stage()), [], 500).rows
    assert [(a.outcome, a.start, a.end) for a in row.attempts] == [("succeeded", 50, 100)]


def test_a_stage_that_has_not_started_has_no_attempt() -> None:
    waiting = stage(state="queued", started_at=None, finished_at=None)
    shown = timeline(page(waiting), [], 500)
    assert (shown.rows[0].attempts, shown.seconds) == ((), 0)
