"""Reports a worker as a row for GET /workers. Does not import torch."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Sequence

from sqlalchemy.exc import SQLAlchemyError

from service.db.queries import workers
from service.db.unit_of_work import UnitOfWork
from service.errors import ServiceError
from service.settings import Settings

_logger = logging.getLogger(__name__)


class Presence:
    """A thread that reports the worker until `stop`.

    Args:
        settings: The installation's settings.
        name: The worker's name.
        queues: The queues that it serves.
        uow: Called for each report, since the database may become available after the worker starts.
        about: Called for each report. Returns the device, the loaded model, and the bytes of GPU memory in use.
    """

    def __init__(
        self,
        settings: Settings,
        name: str,
        queues: Sequence[str],
        uow: Callable[[], UnitOfWork],
        about: Callable[[], tuple[str, str | None, int | None]],
    ) -> None:
        self._settings = settings
        self._name = name
        self._queues = queues
        self._uow = uow
        self._about = about
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)

    def start(self) -> None:
        """Start reporting."""
        self._thread.start()

    def stop(self) -> None:
        """Stop reporting and remove the worker's row."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._try(self._report)
            if self._ended.wait(self._settings.presence_seconds):
                return self._try(self._leave)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except (SQLAlchemyError, ServiceError, OSError) as error:
            _logger.warning(
                "worker not reported: %s", error if isinstance(error, ServiceError) else type(error).__name__
            )

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
