"""The stages of a run over time, with every attempt and the worker that made it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from api.wire.common import ListOut
from api.wire.jobs import StageOut
from service.db.tables import Event

WIDTH = 1000
_MIN_WIDTH = 4.0
_OUTCOMES: Mapping[str, str] = MappingProxyType(
    {
        "stage.succeeded": "succeeded",
        "stage.failed": "failed",
        "stage.retried": "failed",
        "stage.cancelled": "cancelled",
        "stage.paused": "paused",
        "stage.given_back": "returned",
    }
)


@dataclass(frozen=True)
class Attempt:
    """An attempt of a stage.

    Attributes:
        worker: The worker.
        start: When it started, in seconds since 1970.
        end: When it ended, or now.
        outcome: How it ended; "running" if it has not.
        message: Why it failed.
        x: The start of its bar.
        width: The width of its bar.
    """

    worker: str
    start: float
    end: float
    outcome: str
    message: str = ""
    x: float = 0.0
    width: float = 0.0

    @property
    def seconds(self) -> float:
        """How long it took."""
        return max(0.0, self.end - self.start)


@dataclass(frozen=True)
class TimelineRow:
    """A stage with its attempts."""

    stage: StageOut
    name: str
    attempts: tuple[Attempt, ...]

    @property
    def workers(self) -> str:
        """The workers of its attempts, each once, in order."""
        return ", ".join(dict.fromkeys(attempt.worker for attempt in self.attempts if attempt.worker))


@dataclass(frozen=True)
class Timeline:
    """A page of stages on one axis of time.

    Attributes:
        rows: The stages.
        seconds: The length of the axis.
        next_cursor: The next page.
    """

    rows: tuple[TimelineRow, ...]
    seconds: float
    next_cursor: str | None


def timeline(page: ListOut[StageOut], events: Sequence[Event], now: float) -> Timeline:
    """The timeline of a page of stages.

    Args:
        page: The stages.
        events: Their events, in order.
        now: The time of the database, where bars of running attempts end.
    """
    by_stage: dict[str, list[Event]] = {}
    for event in events:
        by_stage.setdefault(event.stage_id or "", []).append(event)
    attempts = {stage.id: tuple(_attempts(stage, by_stage.get(stage.id, ()), now)) for stage in page.data}

    # the axis
    of_all = [attempt for of_stage in attempts.values() for attempt in of_stage]
    start = min((attempt.start for attempt in of_all), default=now)
    end = max((attempt.end for attempt in of_all), default=now)
    span = max(end - start, 1.0)

    rows = []
    for stage in page.data:
        placed = tuple(_placed(attempt, start, span) for attempt in attempts[stage.id])
        rows.append(TimelineRow(stage, f"{stage.kind} {stage.shard + 1}", placed))
    return Timeline(tuple(rows), end - start, page.next_cursor if page.has_more else None)


def _attempts(stage: StageOut, events: Sequence[Event], now: float) -> Iterator[Attempt]:
    """The attempts of a stage by its events; its last one by its row if old events were removed."""
    started: Event | None = None
    has_events = False
    for event in events:
        if event.kind == "stage.started":
            started = event
        elif event.kind in _OUTCOMES and started is not None:
            message = event.message if event.kind in ("stage.failed", "stage.retried") else ""
            yield Attempt(_worker(started), started.at, event.at, _OUTCOMES[event.kind], message)
            has_events = True
            started = None
    if started is not None:
        yield Attempt(_worker(started), started.at, now, "running")
        has_events = True

    if not has_events and stage.started_at is not None:
        end = now if stage.finished_at is None else stage.finished_at.timestamp()
        yield Attempt(stage.worker or "", stage.started_at.timestamp(), end, stage.state)


def _worker(started: Event) -> str:
    return str(started.data.get("worker", ""))


def _placed(attempt: Attempt, start: float, span: float) -> Attempt:
    """The attempt with its bar."""
    x = (attempt.start - start) / span * WIDTH
    width = max(_MIN_WIDTH, attempt.seconds / span * WIDTH)
    return replace(attempt, x=round(min(x, WIDTH - _MIN_WIDTH), 1), width=round(width, 1))
