"""What the stack shows: lines with the name of the part before them, in colours on a terminal; all of it in files."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from collections import deque
from contextlib import suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path

_COLOURS = (36, 33, 35, 32, 34, 95, 96, 93)
_RECORD = re.compile(r"\S+Z (?P<level>[A-Z]+) (?P<logger>\S+): ")
_QUIET_LOGGERS = ("api.access", "api.observe", "celery", "kombu", "uvicorn", "alembic", "httpx")
_LOG_BYTES = 10 << 20
_LOG_FILES = 3
_KEPT_LINES = 20


class Terminal:
    """Standard output, shared by all parts. Once it is gone (a closed window), nothing is shown any more."""

    def __init__(self, width: int, verbose: bool) -> None:
        self._width, self.verbose = width, verbose
        self._lock = threading.Lock()
        self._colours: dict[str, int] = {}
        self._is_coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def show(self, name: str, text: str) -> None:
        """A line of a part; several lines stay together."""
        with self._lock:
            colour = self._colours.setdefault(name, _COLOURS[len(self._colours) % len(_COLOURS)])
            prefix = f"{name:<{self._width}} | "
            if self._is_coloured:
                prefix = f"\033[{colour}m{prefix}\033[0m"
            with suppress(OSError, ValueError):
                sys.stdout.write("".join(f"{prefix}{line}\n" for line in text.splitlines()))
                sys.stdout.flush()


class PartLog:
    """Where a part's lines go: all into its file, which is kept short, and what people should see to the terminal."""

    def __init__(self, name: str, folder: Path, terminal: Terminal, is_ours: bool) -> None:
        self.path = folder / f"{name}.log"
        self._name, self._terminal, self._is_ours = name, terminal, is_ours
        self._file = RotatingFileHandler(self.path, maxBytes=_LOG_BYTES, backupCount=_LOG_FILES, encoding="utf-8")
        self._last: deque[str] = deque(maxlen=_KEPT_LINES)
        self._shows = False

    def write(self, line: str) -> None:
        """Take one line of the part's output."""
        self._file.emit(logging.makeLogRecord({"msg": "%s", "args": (line,)}))
        self._last.append(line)
        if self._terminal.verbose or (self._is_ours and self._is_for_people(line)):
            self._terminal.show(self._name, line)

    def show_last(self) -> None:
        """The last lines once more: the part has died, and they may say why."""
        if self._last and not self._terminal.verbose:
            self._terminal.show(self._name, "\n".join(self._last))
        self._last.clear()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _is_for_people(self, line: str) -> bool:
        """Warnings, and what the service itself does; not each request. A traceback goes with the record before it."""
        record = _RECORD.match(line)
        if record is not None:
            is_loud = record["level"] not in ("DEBUG", "INFO")
            self._shows = is_loud or not record["logger"].startswith(_QUIET_LOGGERS)
        return self._shows
