"""Logs: one line a record, as text or as JSON, with what it is about and without secrets.

What a record is about (request, job, stage, worker) is bound once with `about` and follows the work through awaits and
thread pools; a thread of one's own takes it along with `contextvars.copy_context().run`.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from sqlalchemy import make_url

from service.settings import Settings

HIDDEN = "[secret]"
_SHORTEST_SECRET = 8
"""Shorter values are also words of other texts; whoever has such a password has worse worries than its logs."""
_SECRET_FORMS = (
    (re.compile(r"\bdfk_[A-Za-z0-9_-]{16,}"), f"dfk_{HIDDEN}"),
    (re.compile(r"(://[^\s:/@]*:)[^\s@/]+@"), rf"\1{HIDDEN}@"),
    (re.compile(r"(X-Amz-(?:Signature|Credential|Security-Token)=)[^&\s\"']+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"(authorization['\"]?\s*[:=]\s*['\"]?(?:bearer|basic)\s+)[^\s'\",]+", re.IGNORECASE), rf"\1{HIDDEN}"),
)
_CONTROL_CHARACTERS = {code: f"\\x{code:02x}" for code in (*range(32), 127, 0x85, 0x2028, 0x2029)}
_about: ContextVar[Mapping[str, str]] = ContextVar("dfusion_log_about", default=MappingProxyType({}))


@contextmanager
def about(**names: str) -> Iterator[None]:
    """Within the block every record of this thread or task carries these: request_id, job_id, stage_id, worker."""
    token = _about.set({**_about.get(), **names})
    try:
        yield
    finally:
        _about.reset(token)


def configure(settings: Settings) -> None:
    """Let all loggers of this process write to standard error in the settings' format, from their level on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter_of(settings))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())


def formatter_of(settings: Settings) -> logging.Formatter:
    """The formatter that the settings ask for; it hides their secrets."""
    kind = JsonFormatter if settings.log_format == "json" else TextFormatter
    return kind(secrets_of(settings))


def secrets_of(settings: Settings) -> list[str]:
    """All that may not be in a log: the settings' secret values, and the password of the database's URL."""
    found = [*settings.secrets(), make_url(settings.database).password or ""]
    return sorted((secret for secret in found if len(secret) >= _SHORTEST_SECRET), key=len, reverse=True)


class _Formatter(logging.Formatter):
    """What both formats share: a record's fields, cleaned."""

    def __init__(self, secrets: list[str]) -> None:
        super().__init__()
        self._secrets = secrets

    def clean(self, text: str) -> str:
        """`text` without secrets, known ones or what looks like one."""
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        for form, replacement in _SECRET_FORMS:
            text = form.sub(replacement, text)
        return text

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        """What the record is about, and its own data (`extra={"data": …}`)."""
        data: Mapping[str, Any] = getattr(record, "data", {})
        return {name: self._plain(value) for name, value in {**_about.get(), **data}.items()}

    def _plain(self, value: object) -> Any:
        """`value` as JSON can have it, clean."""
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, Mapping):
            return {self.clean(str(name)): self._plain(inner) for name, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._plain(inner) for inner in value]
        return self.clean(str(value))

    def trace(self, record: logging.LogRecord) -> str:
        """The record's traceback; empty if it has none."""
        return self.clean(self.formatException(record.exc_info)) if record.exc_info else ""


class TextFormatter(_Formatter):
    """For people: time, level, logger, message, fields; a traceback on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        message = self.clean(record.getMessage()).translate(_CONTROL_CHARACTERS)
        fields = " ".join(f"{name}={value}" for name, value in self.fields(record).items())
        line = f"{_time(record)} {record.levelname} {record.name}: {message}"
        if fields:
            line += f" [{fields.translate(_CONTROL_CHARACTERS)}]"
        trace = self.trace(record)
        return f"{line}\n{trace}" if trace else line


class JsonFormatter(_Formatter):
    """For programs: one JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        content: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": self.clean(record.getMessage()),
            **self.fields(record),
        }
        if trace := self.trace(record):
            content["traceback"] = trace
        return json.dumps(content)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
