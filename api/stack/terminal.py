"""Output of the stack: selected lines on the terminal, prefixed with the part's name; all lines in log files."""

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
_RECENT_LINES = 20


class Terminal:
    """Standard output, shared by all parts. Write errors are ignored, such as those of a closed window."""

    def __init__(self, width: int, verbose: bool) -> None:
        self._width = width
        self.verbose = verbose
        self._lock = threading.Lock()
        self._colours: dict[str, int] = {}
        self._is_coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def show(self, name: str, text: str) -> None:
        """Print the lines of a part without mixing them with those of others."""
        with self._lock:
            colour = self._colours.setdefault(name, _COLOURS[len(self._colours) % len(_COLOURS)])
            prefix = f"{name:<{self._width}} | "
            if self._is_coloured:
                prefix = f"\033[{colour}m{prefix}\033[0m"
            with suppress(OSError, ValueError):
                sys.stdout.write("".join(f"{prefix}{line}\n" for line in text.splitlines()))
                sys.stdout.flush()


class PartLog:
    """Log of one part: writes all lines to a rotated file, and important ones to the terminal."""

    def __init__(self, name: str, folder: Path, terminal: Terminal, is_ours: bool) -> None:
        self.path = folder / f"{name}.log"
        self._name = name
        self._terminal = terminal
        self._is_ours = is_ours
        self._file = RotatingFileHandler(self.path, maxBytes=_LOG_BYTES, backupCount=_LOG_FILES, encoding="utf-8")
        self._recent: deque[str] = deque(maxlen=_RECENT_LINES)
        self._is_shown = False

    def write(self, line: str) -> None:
        """Log one line of the part's output."""
        self._file.emit(logging.makeLogRecord({"msg": "%s", "args": (line,)}))
        self._recent.append(line)
        if self._terminal.verbose or (self._is_ours and self._is_important(line)):
            self._terminal.show(self._name, line)

    def show_recent(self) -> None:
        """Show the most recent lines, which may explain why the part has died."""
        if self._recent and not self._terminal.verbose:
            self._terminal.show(self._name, "\n".join(self._recent))
        self._recent.clear()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _is_important(self, line: str) -> bool:
        """Whether to show the line: warnings and the service's messages, but no requests.

        Lines that are no record, such as a traceback, follow the record before them.
        """
        record = _RECORD.match(line)
        if record is not None:
            is_warning = record["level"] not in ("DEBUG", "INFO")
            self._is_shown = is_warning or not record["logger"].startswith(_QUIET_LOGGERS)
        return self._is_shown
