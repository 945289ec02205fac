"""Logging: one line per record, as text or JSON, with context fields and without secrets.

`about` sets the context (request, job, stage, worker) of all records in a block. The context is kept across awaits and
thread pools. For a new thread, pass it on with `contextvars.copy_context().run`.
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
_MIN_SECRET_LENGTH = 8
"""Shorter secrets are not redacted, because they often occur as words in other text."""
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
    """Add context fields (request_id, job_id, stage_id, worker) to all records of this thread or task in the block."""
    token = _about.set({**_about.get(), **names})
    try:
        yield
    finally:
        _about.reset(token)


def configure(settings: Settings) -> None:
    """Configure the root logger: write to standard error, in the format and from the level of the settings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter_of(settings))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())


def formatter_of(settings: Settings) -> logging.Formatter:
    """Return the formatter that the settings select. It redacts the secrets of the settings."""
    kind = JsonFormatter if settings.log_format == "json" else TextFormatter
    return kind(secrets_of(settings))


def secrets_of(settings: Settings) -> list[str]:
    """Return the values to redact, longest first: the secret settings, and the password in the database URL."""
    values = [*settings.secrets(), make_url(settings.database).password or ""]
    return sorted((secret for secret in values if len(secret) >= _MIN_SECRET_LENGTH), key=len, reverse=True)


class _Formatter(logging.Formatter):
    """Base class of both formats: collects the fields of a record and redacts secrets."""

    def __init__(self, secrets: list[str]) -> None:
        super().__init__()
        self._secrets = secrets

    def clean(self, text: str) -> str:
        """Redact known secrets, and text that has the form of a secret."""
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        for form, replacement in _SECRET_FORMS:
            text = form.sub(replacement, text)
        return text

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        """Return the context fields and the record's own data (`extra={"data": …}`), redacted."""
        data: Mapping[str, Any] = getattr(record, "data", {})
        return {name: self._plain(value) for name, value in {**_about.get(), **data}.items()}

    def _plain(self, value: object) -> Any:
        """Convert a value to a JSON type and redact it."""
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, Mapping):
            return {self.clean(str(name)): self._plain(inner) for name, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._plain(inner) for inner in value]
        return self.clean(str(value))

    def trace(self, record: logging.LogRecord) -> str:
        """Return the redacted traceback of the record, or an empty string."""
        return self.clean(self.formatException(record.exc_info)) if record.exc_info else ""


class TextFormatter(_Formatter):
    """Text for people: time, level, logger, message and fields on one line, then the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        message = self.clean(record.getMessage()).translate(_CONTROL_CHARACTERS)
        fields = " ".join(f"{name}={value}" for name, value in self.fields(record).items())
        line = f"{_time(record)} {record.levelname} {record.name}: {message}"
        if fields:
            line += f" [{fields.translate(_CONTROL_CHARACTERS)}]"
        trace = self.trace(record)
        return f"{line}\n{trace}" if trace else line


class JsonFormatter(_Formatter):
    """JSON for programs: one object per line."""

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
