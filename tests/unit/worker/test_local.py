"""The worker's loop and its log."""

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import text

from service import logs
from service.db.queries import free_stages, stages
from service.jobs import execution
from service.jobs.kinds import RoundSpec
from service.service import Service, create_job
from tests.service import round_body, settings_for
from worker import local
from worker.heartbeat import Heartbeat
from worker.runner import run_stage
from worker.workbench import Workbench

PATIENCE_SECONDS = 120
MORE_THAN_ANY_DISK_MB = 10**12


class Lines(logging.Handler):
    """Records log lines, and sets an event at the first warning."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logs.JsonFormatter([]))
        self.lines: list[dict[str, str]] = []
        self.warned = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(json.loads(self.format(record)))
        if record.levelno == logging.WARNING:
            self.warned.set()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """An installation with one job, whose model is missing."""
    opened = Service.open(settings_for(tmp_path / "data", tmp_path / "nothing"))
    create_job(opened, RoundSpec.model_validate(round_body()))
    yield opened
    opened.close()


@pytest.fixture
def watched() -> Iterator[Lines]:
    """The worker's log lines."""
    lines, logger = Lines(), logging.getLogger("worker")
    level = logger.level
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(lines)
    logger.setLevel(level)


def test_a_worker_whose_disk_is_nearly_full_begins_nothing(service: Service, watched: Lines) -> None:
    settings = service.settings.model_copy(update={"min_free_disk_mb": MORE_THAN_ANY_DISK_MB})
    stop = threading.Event()
    thread = threading.Thread(target=local.work, args=(settings, "w", stop))
    thread.start()
    try:
        assert watched.warned.wait(PATIENCE_SECONDS)
    finally:
        stop.set()
        thread.join(PATIENCE_SECONDS)
    assert [line["message"] for line in watched.lines if line["level"] == "warning"] == [
        "disk nearly full; not starting any stage"
    ]
    with service.uow.reading() as session:
        assert free_stages.any_free(session)
        assert stages.running_under(session, "") == []


def test_a_worker_whose_disk_has_room_begins_the_same_work(service: Service) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=local.work, args=(service.settings, "w", stop))
    thread.start()
    begun = False
    for _ in range(PATIENCE_SECONDS * 10):
        with service.uow.reading() as session:
            begun = not free_stages.any_free(session)
        if begun:
            break
        stop.wait(0.1)
    stop.set()
    thread.join(PATIENCE_SECONDS)
    assert begun


def test_every_line_about_a_stage_names_it_and_its_job(service: Service, watched: Lines) -> None:
    held = execution.claim(service.uow, service.settings, "w")
    assert held is not None
    with logs.about(worker="w"):
        run_stage(Workbench.of(service), held, threading.Event())
    assert [line["level"] for line in watched.lines] == ["info", "error"]
    for line in watched.lines:
        assert (line["job_id"], line["stage_id"], line["worker"]) == (held.job_id, held.stage_id, "w")


def test_the_heartbeats_thread_names_them_too(service: Service, watched: Lines) -> None:
    held = execution.claim(service.uow, service.settings, "w")
    assert held is not None
    with service.uow.writing() as session:
        session.execute(text("ALTER TABLE stages RENAME TO away"))
    with logs.about(job_id=held.job_id), Heartbeat(Workbench.of(service), held, threading.Event()):
        assert watched.warned.wait(PATIENCE_SECONDS)
    assert {line["job_id"] for line in watched.lines} == {held.job_id}


def test_a_worker_asks_for_its_model_only_while_it_prefers_it(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as long as the model is loaded: the stages of other models would wait for ever."""
    preferences = []

    def record(*_arguments: object, prefer_base: str | None) -> None:
        preferences.append(prefer_base)

    monkeypatch.setattr(execution, "claim", record)
    for preferred in ("tiny", None):
        bench: Any = SimpleNamespace(
            settings=service.settings, uow=service.uow, models=SimpleNamespace(loaded="tiny", preferred=preferred)
        )
        assert local._run_next(bench, "w", threading.Event()) is False
    assert preferences == ["tiny", None]
