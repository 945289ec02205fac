"""`python -m worker.sweeper`: finds what was lost (leases, hints, workers), one sweeper at a time. No torch."""

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
from worker.presence import touch

_LOCK = 0x6466_7573_696F_6E01
"""The sweepers' advisory lock on PostgreSQL: any number, but always the same."""
_logger = logging.getLogger(__name__)


def main() -> None:
    """Sweep until stopped."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    settings = Settings.or_exit()
    logs.configure(settings)
    service, next_collection = Service.open(settings, open_queue(settings)), 0.0
    try:
        while not stop.is_set():
            try:
                if sweep_once(service) and time.monotonic() >= next_collection:
                    next_collection = time.monotonic() + settings.collect_seconds
                    _logger.info("%s", collect(service.uow, service.store, settings))
            except (SQLAlchemyError, ServiceError) as error:
                _logger.warning("no sweep: %s", type(error).__name__)
            touch(settings)
            stop.wait(settings.sweep_seconds)
    finally:
        service.close()


def sweep_once(service: Service) -> bool:
    """One sweep, unless another sweeper is at it (False)."""
    with _turn(service) as mine:
        if mine:
            lost = execution.sweep(service.uow, service.settings)
            hinted = execution.hint_again(service.uow, service.settings)
            with service.uow.writing() as session:
                workers.forget_silent(session)
            if lost or hinted:
                _logger.info("%d stages lost their worker, %d are hinted again", lost, hinted)
        return mine


@contextmanager
def _turn(service: Service) -> Iterator[bool]:
    """Whether this sweeper has the lock; it is held within the block, and freed if this process dies."""
    if service.settings.database.startswith("sqlite"):
        with ExitStack() as stack:
            try:
                stack.enter_context(file_lock(service.settings.data_dir / "sweeper.lock"))
            except AlreadyRunningError:
                mine = False
            else:
                mine = True
            yield mine
        return
    with service.uow.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        mine = bool(connection.scalar(text("SELECT pg_try_advisory_lock(:lock)"), {"lock": _LOCK}))
        try:
            yield mine
        finally:
            if mine:
                connection.execute(text("SELECT pg_advisory_unlock(:lock)"), {"lock": _LOCK})


if __name__ == "__main__":
    main()
