"""The API as several processes that share one port: forks of a parent, which replaces those that end or hang.

The first process starts alone, so that it alone migrates the database and reports why the service cannot start. The
others follow once it serves requests. Forks share the memory of the modules that the parent has imported, and a
replacement starts in milliseconds; uvicorn's own supervisor starts new interpreters, and waits without limit at a stop.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from service.errors import StartError
from service.pulse import Pulse, PulseMonitor
from service.settings import Settings

_LOOK_SECONDS = 0.2
_MAX_PAUSE_SECONDS = 30.0
_HEALTHY_SECONDS = 60.0
CLOSE_SECONDS = 10.0
"""How long a process may close its connections after `shutdown_seconds` before it is killed."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
_logger = logging.getLogger(__name__)


def require_shareable(settings: Settings) -> None:
    """Raises StartError if the API cannot run in the number of processes of the settings."""
    if settings.api_processes == 1:
        return

    reason = None
    if settings.database.startswith("sqlite"):
        reason = "SQLite allows one process; set DFUSION_DATABASE_URL to a PostgreSQL database"
    elif settings.embedded_worker and not settings.broker:
        reason = "with an embedded worker, the service is one process; set DFUSION_BROKER_URL and start workers"
    elif settings.requests_per_second and not settings.broker:
        reason = "the processes count requests together in Redis; set DFUSION_BROKER_URL"
    if reason is not None:
        raise StartError(f"DFUSION_API_PROCESSES={settings.api_processes}: {reason}, or use one process")


class _Process:
    """One of the processes. Its number stays the same when it is replaced."""

    def __init__(self, number: int, settings: Settings) -> None:
        self.number = number
        self.pid: int | None = None
        self.due_at = 0.0
        """When it starts, if it does not run."""
        self.has_served = False
        """Whether it has begun to serve requests since it was started."""
        self._settings = settings
        self._pause = settings.restart_seconds

    def fork(self) -> bool:
        """Fork this process. Returns whether the caller is the child."""
        self.pulse = Pulse()
        self._monitor = PulseMonitor(self.pulse, self._settings.lease_seconds)
        self._started_at = time.monotonic()
        self.has_served = False
        self.pid = os.fork() or None
        return self.pid is None

    def check(self) -> None:
        """Look for signs of life. Kill the process if it gives none any more."""
        self.has_served = self.has_served or self.pulse.count > 0
        if self.has_served and self._monitor.is_hung():
            silence = f"has not responded for {self._monitor.silent_seconds:.0f} s"
            _logger.error("API process %d (pid %d) %s; killing it", self.number, self.pid, silence)
            self.send(signal.SIGKILL)
            self._monitor.restart()  # it is logged once, although the process may not have ended at the next look

    def exit_code(self) -> int | None:
        """Return the exit code if the process has just ended, negative for a signal. Otherwise None."""
        if self.pid is None:
            return None
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0:
            return None

        self.pid = None
        if time.monotonic() - self._started_at > _HEALTHY_SECONDS:
            self._pause = self._settings.restart_seconds
        self.due_at = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, _MAX_PAUSE_SECONDS)
        return os.waitstatus_to_exitcode(status)

    def send(self, number: int) -> None:
        """Send a signal, if the process runs."""
        if self.pid is not None:
            os.kill(self.pid, number)


class ProcessGroup:
    """Runs the API's processes until it is asked to stop.

    Args:
        settings: The settings; `api_processes` is the number of processes.
        serve: Called in each process with its number and its pulse. It serves requests until SIGTERM.
    """

    def __init__(self, settings: Settings, serve: Callable[[int, Pulse], None]) -> None:
        self._settings = settings
        self._serve = serve
        self._processes = [_Process(number, settings) for number in range(settings.api_processes)]
        self._has_served = False
        """Whether any of them has served requests."""
        self._mask: set[int] = set()
        # closed by the kernel when this process ends, even by SIGKILL
        self._parent_ended, self._parent_runs = os.pipe()

    def run(self) -> int:
        """Run the processes until SIGTERM or SIGINT.

        Returns:
            0, or the exit code of the first process if it could not start.
        """
        # blocked signals are kept until sigtimedwait takes them, so that none is lost
        self._mask = set(signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS))
        try:
            while True:
                self._start_due()
                if self._next_signal(_LOOK_SECONDS) is not None:
                    self._stop(self._settings.shutdown_seconds + CLOSE_SECONDS)
                    return 0

                for process in self._running():
                    process.check()
                if code := self._handle_ends():
                    return code
        finally:
            self._stop(0)
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _running(self) -> list[_Process]:
        return [process for process in self._processes if process.pid is not None]

    def _start_due(self) -> None:
        """Start the processes that are due: the first one alone, the others once one has served requests."""
        self._has_served = self._has_served or any(process.has_served for process in self._processes)
        now = time.monotonic()
        for process in self._processes if self._has_served else self._processes[:1]:
            if process.pid is None and now >= process.due_at:
                if process.fork():
                    self._run_child(process)
                _logger.info("API process %d has pid %d", process.number, process.pid)

    def _handle_ends(self) -> int:
        """Log which processes have ended. Returns the exit code of the first one if it could not start, otherwise 0."""
        for process in self._running():
            pid = process.pid
            code = process.exit_code()
            if code is None:
                continue
            end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            _logger.error("API process %d (pid %d) %s", process.number, pid, end)
            if not self._has_served:
                return max(code, 1)
        return 0

    def _next_signal(self, seconds: float) -> signal.Signals | None:
        """Wait for a request to stop, at most this long. Returns None without one, also if a process has ended."""
        received = signal.sigtimedwait(_SIGNALS, seconds)
        if received is None or received.si_signo == signal.SIGCHLD:
            return None
        return signal.Signals(received.si_signo)

    def _stop(self, seconds: float) -> None:
        """Stop all processes. Kill those that have not ended in time, and all at a second SIGINT."""
        deadline = time.monotonic() + seconds
        for process in self._running():
            process.send(signal.SIGTERM)

        while running := [process for process in self._running() if process.exit_code() is None]:
            remaining = deadline - time.monotonic()
            is_over = remaining <= 0 or self._next_signal(min(remaining, _LOOK_SECONDS)) is signal.SIGINT
            if not is_over:
                continue
            for process in running:
                _logger.error(
                    "API process %d (pid %d) has not stopped in time; killing it", process.number, process.pid
                )
                process.send(signal.SIGKILL)
            deadline = time.monotonic() + CLOSE_SECONDS

    def _run_child(self, process: _Process) -> NoReturn:
        """Serve requests in a forked process, which ends without cleaning up what belongs to its parent."""
        code = 1
        try:
            os.close(self._parent_runs)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent stops the others
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
            threading.Thread(target=self._stop_with_parent, name="parent-watch", daemon=True).start()
            self._serve(process.number, process.pulse)
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            _logger.exception("API process %d failed", process.number)
        finally:
            logging.shutdown()
            os._exit(code)

    def _stop_with_parent(self) -> None:
        while os.read(self._parent_ended, 1):
            pass
        with suppress(ProcessLookupError):
            os.kill(os.getpid(), signal.SIGTERM)
