"""Log lines: their fields, and redaction of secrets."""

import io
import json
import logging
import threading
from collections.abc import Iterator
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from service import logs
from service.settings import Settings

KEY = "dfk_" + "q9" * 20
PASSWORD = "hunter-number-two"
STORAGE_SECRET = 'storage"secret\\key'


class StorageSettings(Settings):
    """Settings with an additional secret of another part of the service."""

    storage_secret: SecretStr = SecretStr("")


def settings(**changes: Any) -> Settings:
    values: dict[str, Any] = {
        "bootstrap_admin_key": KEY,
        "database_url": f"postgresql+psycopg://dfusion:{PASSWORD}@db:5432/dfusion",
        "storage_secret": STORAGE_SECRET,
    }
    return StorageSettings(_env_file=None, **(values | changes))  # type: ignore[call-arg]


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger, restored afterwards. Resets uvicorn's loggers, which servers of other tests configure."""
    logger = logging.getLogger()
    handlers, level = logger.handlers[:], logger.level
    servers = [logging.getLogger(name) for name in ("uvicorn", "uvicorn.error")]
    before = [(server.level, server.propagate) for server in servers]
    for server in servers:
        server.setLevel(logging.NOTSET)
        server.propagate = True
    yield logger
    logger.handlers[:], logger.level = handlers, level
    for server, (own_level, propagate) in zip(servers, before, strict=True):
        server.setLevel(own_level)
        server.propagate = propagate


def record(message: str, *arguments: object, **extra: object) -> logging.LogRecord:
    log_record = logging.LogRecord("api.test", logging.WARNING, __file__, 1, message, arguments, None)
    log_record.__dict__.update(extra)
    log_record.created = 1_700_000_000.25  # 2023-11-14 22:13:20.25 UTC
    return log_record


def as_json(log_record: logging.LogRecord, **changes: Any) -> dict[str, Any]:
    return dict(json.loads(logs.formatter_of(settings(log_format="json", **changes)).format(log_record)))


def as_text(log_record: logging.LogRecord) -> str:
    return logs.formatter_of(settings()).format(log_record)


def test_a_json_line_holds_what_it_is_about() -> None:
    with logs.about(worker="w1"), logs.about(job_id="job_1", stage_id="stg_1"):
        line = as_json(record("%s is done", "it", data={"seconds": 1.5, "where": Path("/x")}))
    assert line == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "warning",
        "logger": "api.test",
        "message": "it is done",
        "worker": "w1",
        "job_id": "job_1",
        "stage_id": "stg_1",
        "seconds": 1.5,
        "where": "/x",
    }
    assert "worker" not in as_json(record("later"))


def test_a_text_line_is_one_line() -> None:
    with logs.about(request_id="r1"):
        line = as_text(record("a\nforged: line\x1b[31m\u2028x", data={"path": "/a\nb"}))
    assert line == (
        "2023-11-14T22:13:20.250Z WARNING api.test: a\\x0aforged: line\\x1b[31m\\x2028x [request_id=r1 path=/a\\x0ab]"
    )


def test_what_a_record_is_about_goes_into_a_thread_that_takes_it_along() -> None:
    seen: list[dict[str, Any]] = []

    def work() -> None:
        seen.append(as_json(record("from a thread")))

    with logs.about(job_id="job_1"):
        threads = [threading.Thread(target=copy_context().run, args=(work,)), threading.Thread(target=work)]
    for thread in threads:
        thread.start()
        thread.join()
    assert [line.get("job_id") for line in seen] == ["job_1", None]


LEAKS = [
    KEY,
    "Authorization: Bearer " + KEY,
    "{'authorization': 'Bearer abcdefgh12345678'}",
    f"postgresql+psycopg://dfusion:{PASSWORD}@db:5432/dfusion",
    f"password authentication failed: {PASSWORD}",
    "http://user:another-password@host/x",
    STORAGE_SECRET,
    "http://s3/bucket/key?X-Amz-Signature=0123abcd&X-Amz-Credential=AKIAX%2F2023",
]
SECRETS = [
    KEY,
    KEY[4:],
    "abcdefgh12345678",
    PASSWORD,
    "another-password",
    STORAGE_SECRET,
    json.dumps(STORAGE_SECRET)[1:-1],
    "0123abcd",
    "AKIAX",
]


@pytest.mark.parametrize("leak", LEAKS)
def test_secrets_are_hidden_wherever_they_stand(leak: str) -> None:
    error = RuntimeError(f"cannot use {leak} here")
    log_record = record("found %s in it", leak, data={"field": leak, "thing": error, "inner": {"list": [leak]}})
    log_record.exc_info = (RuntimeError, error, None)
    for line in (as_text(log_record), json.dumps(as_json(log_record))):
        assert [secret for secret in SECRETS if secret in line] == []
        assert logs.HIDDEN in line
        assert "found" in line
        assert "in it" in line
        assert "cannot use" in line


def test_what_is_no_secret_is_left() -> None:
    harmless = "GET http://127.0.0.1:8000/jobs/job_1 by dfk_q9q9q9q9 mail a@b.c at 12:30 dfusion"
    assert harmless in as_text(record(harmless))


def test_a_short_password_does_not_garble_the_log() -> None:
    line = as_json(record("dfusion is ready"), database_url="postgresql+psycopg://dfusion:dfusion@db/dfusion")
    assert line["message"] == "dfusion is ready"


def test_settings_hide_their_secrets_when_they_are_shown_or_wrong() -> None:
    shown = f"{settings()!r} {settings()}"
    assert [secret for secret in SECRETS if secret in shown] == []
    with pytest.raises(ValidationError) as raised:
        Settings(_env_file=None, port=PASSWORD)  # type: ignore[call-arg, arg-type]
    assert PASSWORD not in str(raised.value)


@pytest.mark.parametrize(("level", "lines"), [("debug", 3), ("info", 2), ("error", 1)])
def test_the_level_of_the_settings_counts(
    root: logging.Logger, monkeypatch: pytest.MonkeyPatch, level: str, lines: int
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    logs.configure(settings(log_format="json", log_level=level))
    for logger, severity in (("a.b", logging.DEBUG), ("uvicorn.error", logging.INFO), ("c", logging.ERROR)):
        logging.getLogger(logger).log(severity, "said")
    written = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["message"] for line in written] == ["said"] * lines
    assert len(root.handlers) == 1
