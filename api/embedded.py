"""Embedded mode: the service starts one worker process, replaces it if it dies or hangs, and does the maintenance.

The worker is a separate program (`python -m worker.local`); this package imports nothing from it. Its standard input
is a pipe from the service. When the service ends, even by SIGKILL, the pipe closes and the worker stops. A worker that
does not respond for the duration of a lease is killed.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from tempfile import TemporaryFile

from sqlalchemy.exc import SQLAlchemyError

from service.errors import ServiceError
from service.jobs import execution
from service.maintenance import maintain
from service.pulse import Pulse, PulseMonitor
from service.service import Service

_OWNER_PREFIX = "embedded-"
"""Prefix of the names of embedded workers."""
_MAX_PAUSE_SECONDS = 30.0
_HEALTHY_SECONDS = 60.0
_LOOK_SECONDS = 0.1
_MAINTENANCE_STOP_SECONDS = 15.0
_logger = logging.getLogger(__name__)


class WorkerSupervisor:
    """Keeps one worker process alive, sweeps and collects, until `stop`."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._pulse_file = TemporaryFile()
        self._pulse_file.truncate(1)
        self._monitor = PulseMonitor(Pulse(self._pulse_file.fileno()), service.settings.lease_seconds)
        self._thread = threading.Thread(target=self._supervise, name="worker-supervisor", daemon=True)
        arguments = (service, self._stopping)
        self._maintenance = threading.Thread(target=maintain, args=arguments, name="maintenance", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether a worker process runs now."""
        process = self._process
        return process is not None and process.poll() is None

    @property
    def silent_seconds(self) -> float:
        """How long the worker process has not responded, in seconds."""
        return self._monitor.silent_seconds

    @property
    def pid(self) -> int | None:
        """The worker's process id."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start the worker. On SQLite, first requeue the stages of an earlier service's worker.

        SQLite allows one service at a time. On other databases the stages may belong to another service's worker, so
        they wait until its lease expires.
        """
        if self._service.uow.engine.dialect.name == "sqlite":
            execution.requeue_stages_of(self._service.uow, self._service.settings, _OWNER_PREFIX)
        self._thread.start()
        self._maintenance.start()

    def stop(self) -> None:
        """Stop the worker. Kill it if it does not end in time."""
        self._stopping.set()
        self._thread.join(self._service.settings.shutdown_seconds + 5)
        self._maintenance.join(_MAINTENANCE_STOP_SECONDS)
        self._pulse_file.close()

    def _supervise(self) -> None:
        pause = self._service.settings.restart_seconds
        number = 0
        while not self._stopping.is_set():
            number += 1
            owner = f"{_OWNER_PREFIX}{socket.gethostname()}-{os.getpid()}-{number}."
            started_at = time.monotonic()

            try:
                code = self._run(owner)
                requeued = execution.requeue_stages_of(self._service.uow, self._service.settings, owner)
            except (OSError, SQLAlchemyError, ServiceError):
                _logger.exception("supervising the worker failed; retrying")
            else:
                if self._stopping.is_set():
                    return
                _logger.error("the worker ended with exit code %d, leaving %d stages; restarting it", code, requeued)

            if time.monotonic() - started_at > _HEALTHY_SECONDS:
                pause = self._service.settings.restart_seconds
            self._stopping.wait(pause)
            pause = min(pause * 2, _MAX_PAUSE_SECONDS)

    def _run(self, owner: str) -> int:
        """Run one worker process until it ends. Returns its exit code."""
        descriptor = self._pulse_file.fileno()
        command = [sys.executable, "-m", "worker.local", "--name", owner, "--pulse", str(descriptor)]
        environment = self._service.settings.for_child()
        with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, pass_fds=[descriptor]) as process:
            self._process = process
            self._monitor.restart()
            while process.poll() is None:
                if self._monitor.is_hung():
                    _logger.error("the worker has not responded for %.0f s; replacing it", self.silent_seconds)
                    process.kill()
                    process.wait()
                elif self._stopping.wait(_LOOK_SECONDS):
                    self._terminate(process)
            return process.returncode

    def _terminate(self, process: subprocess.Popen[bytes]) -> None:
        process.terminate()
        try:
            process.wait(self._service.settings.shutdown_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
