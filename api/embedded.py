"""Embedded mode: the service starts one worker process and starts it again if it dies.

The worker is a program of its own (`python -m worker.local`); nothing of it is imported here. It holds the other end
of a pipe to its standard input: when the service is gone, however it went, the pipe closes and the worker stops.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time

from sqlalchemy.exc import SQLAlchemyError

from service.errors import ServiceError
from service.jobs import execution
from service.service import Service

_OWNER = "embedded-"
"""How the names of such workers begin."""
_LONGEST_PAUSE_SECONDS = 30.0
_HEALTHY_SECONDS = 60.0
_logger = logging.getLogger(__name__)


class WorkerSupervisor:
    """Keeps one worker process alive until `stop`."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._supervise, name="worker-supervisor", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether a worker process runs now."""
        process = self._process
        return process is not None and process.poll() is None

    @property
    def pid(self) -> int | None:
        """The worker's process id."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Begin; what an earlier service's worker held goes back to the queue. SQLite has one service at a time;
        on another database it may be another service's worker, which waits for its lease."""
        if self._service.uow.engine.dialect.name == "sqlite":
            execution.requeue_stages_of(self._service.uow, self._service.settings, _OWNER)
        self._thread.start()

    def stop(self) -> None:
        """Ask the worker to stop, wait for it, and end it if it does not."""
        self._stopping.set()
        self._thread.join(self._service.settings.shutdown_seconds + 5)

    def _supervise(self) -> None:
        pause, number = self._service.settings.restart_seconds, 0
        while not self._stopping.is_set():
            number += 1
            owner, started = f"{_OWNER}{socket.gethostname()}-{os.getpid()}-{number}.", time.monotonic()
            try:
                code = self._run(owner)
                lost = execution.requeue_stages_of(self._service.uow, self._service.settings, owner)
            except (OSError, SQLAlchemyError, ServiceError):
                _logger.exception("the worker cannot be watched just now; it is tried again")
            else:
                if self._stopping.is_set():
                    return
                _logger.error("the worker ended with exit code %d and left %d stages; it is restarted", code, lost)
            if time.monotonic() - started > _HEALTHY_SECONDS:
                pause = self._service.settings.restart_seconds
            self._stopping.wait(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)

    def _run(self, owner: str) -> int:
        """Run one worker process to its end; its exit code."""
        command = [sys.executable, "-m", "worker.local", "--name", owner]
        environment = self._service.settings.for_child()
        with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment) as process:
            self._process = process
            while process.poll() is None:
                if self._stopping.wait(0.1):
                    self._end(process)
            return process.returncode

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.terminate()
        try:
            process.wait(self._service.settings.shutdown_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
