"""Ends a worker process whose main thread hangs. Does not import torch."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from service.pulse import Pulse
from service.settings import Settings

_INTERVAL_SECONDS = 1.0
_logger = logging.getLogger(__name__)


def touch(settings: Settings) -> None:
    """Renew the health file, if one is configured."""
    if settings.health_file:
        try:
            Path(settings.health_file).touch()
        except OSError as error:
            _logger.warning("health file (DFUSION_HEALTH_FILE) not renewed: %s", error.strerror)


def end_process() -> None:
    """End this process immediately, as a crash does. Its parent replaces it."""
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class _Expectation:
    """What the main thread does, and how long it may take."""

    activity: str
    seconds: float
    until: float


class Watchdog:
    """A thread that renews the signs of life of this process, and ends the process if its main thread hangs.

    The signs are the pulse that the parent watches, and the health file. A process that is stopped, or whose
    interpreter hangs, does not renew them either; its parent then ends it.

    Args:
        settings: The installation's settings.
        pulse: Shared with the parent. None if no parent watches this process.
        end: Ends the process.
    """

    def __init__(self, settings: Settings, pulse: Pulse | None = None, end: Callable[[], None] = end_process) -> None:
        self._settings = settings
        self._pulse = pulse
        self._end = end
        self._expectation: _Expectation | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start watching."""
        self._thread.start()

    def stop(self) -> None:
        """Stop watching."""
        self._stopped.set()
        self._thread.join()

    def expect(self, activity: str, seconds: float) -> None:
        """End this process unless `expect` or `rest` is called again within this time.

        Args:
            activity: What the main thread does now, for the log: "step 3 of 20".
            seconds: How long it may take.
        """
        self._expectation = _Expectation(activity, seconds, time.monotonic() + seconds)

    def rest(self) -> None:
        """Expect nothing: the main thread is idle."""
        self._expectation = None

    def _run(self) -> None:
        while True:
            expected = self._expectation
            if expected is not None and time.monotonic() > expected.until:
                _logger.error("no progress for %.0f s: %s; ending this process", expected.seconds, expected.activity)
                return self._end()

            if self._pulse is not None:
                self._pulse.beat()
            touch(self._settings)
            if self._stopped.wait(_INTERVAL_SECONDS):
                return None
