"""`python -m worker.sweeper`: recovers lost leases, hints and workers, one sweeper at a time.

Does not import torch.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from service import logs
from service.broker import open_queue
from service.db.queries import workers
from service.errors import AlreadyRunningError, ServiceError
from service.file_lock import file_lock
from service.jobs import execution
from service.jobs.collector import collect
from service.service import Service
from service.settings import Settings
from worker.watchdog import touch

_LOCK = 0x6466_7573_696F_6E01
"""The sweepers' advisory lock on PostgreSQL: an arbitrary constant."""
_logger = logging.getLogger(__name__)


def main() -> None:
    """Sweep until stopped."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    settings = Settings.or_exit()
    logs.configure(settings)
    service = Service.open(settings, open_queue(settings))
    next_collection = 0.0
    try:
        while not stop.is_set():
            try:
                if sweep_once(service) and time.monotonic() >= next_collection:
                    next_collection = time.monotonic() + settings.collect_seconds
                    _logger.info("%s", collect(service.uow, service.store, settings))
            except (SQLAlchemyError, ServiceError) as error:
                _logger.warning("sweep failed: %s", type(error).__name__)
            touch(settings)
            stop.wait(settings.sweep_seconds)
    finally:
        service.close()


def sweep_once(service: Service) -> bool:
    """Sweep, unless another sweeper holds the lock. Returns whether this sweeper ran."""
    with _lock(service) as locked:
        if locked:
            lost = execution.sweep(service.uow, service.settings)
            hinted = execution.rehint(service.uow, service.settings)
            with service.uow.writing() as session:
                workers.forget_silent(session)
            if lost or hinted:
                _logger.info("requeued %d stages of lost workers, repeated %d hints", lost, hinted)
        return locked


@contextmanager
def _lock(service: Service) -> Iterator[bool]:
    """Yields whether this sweeper has the lock. It is held within the block, and freed if this process dies."""
    if service.settings.database.startswith("sqlite"):
        with ExitStack() as stack:
            try:
                stack.enter_context(file_lock(service.settings.data_dir / "sweeper.lock"))
            except AlreadyRunningError:
                locked = False
            else:
                locked = True
            yield locked
        return

    with service.uow.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        locked = bool(connection.scalar(text("SELECT pg_try_advisory_lock(:lock)"), {"lock": _LOCK}))
        try:
            yield locked
        finally:
            if locked:
                connection.execute(text("SELECT pg_advisory_unlock(:lock)"), {"lock": _LOCK})


if __name__ == "__main__":
    main()
