"""A worker says that it is there: a row for GET /workers, and a file for a container's health check. No torch."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from service.db.queries import workers
from service.db.unit_of_work import UnitOfWork
from service.errors import ServiceError
from service.settings import Settings

_logger = logging.getLogger(__name__)


class Presence:
    """A thread that reports the worker until `stop`.

    `uow` and `about` (device, loaded model, GPU memory) are asked each time: they may come later than the worker.
    """

    def __init__(
        self,
        settings: Settings,
        name: str,
        queues: Sequence[str],
        uow: Callable[[], UnitOfWork],
        about: Callable[[], tuple[str, str | None, int | None]],
    ) -> None:
        self._settings, self._name, self._queues = settings, name, queues
        self._uow, self._about = uow, about
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)

    def start(self) -> None:
        """Begin to report."""
        self._thread.start()

    def stop(self) -> None:
        """The worker ends: its row goes."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._try(self._report)
            touch(self._settings)
            if self._over.wait(self._settings.presence_seconds):
                return self._try(self._leave)

    def _try(self, what: Callable[[], None]) -> None:
        try:
            what()
        except (SQLAlchemyError, ServiceError, OSError) as error:
            _logger.warning("this worker cannot report itself: %s", type(error).__name__)

    def _report(self) -> None:
        device, model, memory = self._about()
        with self._uow().writing() as session:
            workers.report(
                session,
                name=self._name,
                host=socket.gethostname(),
                pid=os.getpid(),
                queues=self._queues,
                device=device,
                model=model,
                gpu_memory_bytes=memory,
            )

    def _leave(self) -> None:
        with self._uow().writing() as session:
            workers.remove(session, self._name)


def touch(settings: Settings) -> None:
    """Renew the health file, if there is to be one."""
    if settings.health_file:
        try:
            Path(settings.health_file).touch()
        except OSError as error:
            _logger.warning("the health file cannot be touched: %s", error.strerror)
