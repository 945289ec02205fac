"""Periodic maintenance: sweeps, and collections and webhooks in separate threads, which do not delay the sweeps.

Any number of processes may do maintenance; one sweeps and one collects at a time. Does not import torch.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from sqlalchemy.exc import SQLAlchemyError

from service import webhooks
from service.db.locks import AdvisoryLock, try_hold
from service.db.queries import deletion, workers
from service.db.queries.collection import START
from service.errors import AlreadyRunningError, ServiceError
from service.file_lock import file_lock
from service.jobs import execution
from service.jobs.collector import Collector
from service.service import Service

_RUN_SECONDS = 10.0
"""Maximum time that a collection runs before it pauses."""
_FAILURE_SECONDS = 60.0
"""The longest pause after a collection that failed."""
_STOP_SECONDS = 10.0
"""How long a stop waits for a running collection."""
_LOCK_FILES = {AdvisoryLock.SWEEP: "sweeper.lock", AdvisoryLock.COLLECTION: "collector.lock"}
_logger = logging.getLogger(__name__)


def maintain(service: Service, stop: threading.Event, after_sweep: Callable[[], None] = lambda: None) -> None:
    """Sweep and collect until `stop` is set. Failures are logged, and the next sweep or collection tries again.

    Args:
        service: The installation.
        stop: Ends the maintenance.
        after_sweep: Called after each sweep, also a failed one.
    """
    collection = threading.Thread(target=_collect_until, args=(service, stop), name="collection", daemon=True)
    collection.start()
    deliveries = threading.Thread(target=_deliver_until, args=(service, stop), name="webhooks", daemon=True)
    deliveries.start()

    while not stop.is_set():
        started = time.monotonic()
        try:
            sweep_once(service)
        except (SQLAlchemyError, ServiceError) as error:
            _logger.warning("sweep failed: %s", type(error).__name__)
        except Exception:  # a thread that ends would end all maintenance unnoticed
            _logger.exception("sweep failed")
        after_sweep()
        stop.wait(max(0.0, service.settings.sweep_seconds - (time.monotonic() - started)))

    collection.join(_STOP_SECONDS)
    deliveries.join(_STOP_SECONDS)


def sweep_once(service: Service) -> bool:
    """Sweep, unless another process does. Returns whether it has swept."""
    with _lock(service, AdvisoryLock.SWEEP) as is_locked:
        if is_locked:
            lost = execution.sweep(service.uow, service.settings)
            hinted = execution.rehint(service.uow, service.settings)
            execution.count_missed(service.uow)
            with service.uow.writing() as session:
                workers.forget_silent(session)
            if lost or hinted:
                _logger.info("requeued %d stages of lost workers, repeated %d hints", lost, hinted)
        return is_locked


def _deliver_until(service: Service, stop: threading.Event) -> None:
    """Send due deliveries to webhooks until `stop` is set. Several processes may do so: each claims what it sends."""
    while not stop.is_set():
        sent = 0
        try:
            sent = webhooks.deliver_due(service)
        except (SQLAlchemyError, ServiceError) as error:
            _logger.warning("sending webhooks failed: %s", type(error).__name__)
        except Exception:  # see `maintain`
            _logger.exception("sending webhooks failed")
        stop.wait(0 if sent else service.settings.sweep_seconds)


def _collect_until(service: Service, stop: threading.Event) -> None:
    """Collect until `stop` is set."""
    settings = service.settings
    collector = Collector(service.uow, service.store, settings)
    while not stop.is_set():
        pause = settings.collect_seconds
        try:
            if not _collect_once(service, collector, stop):
                pause = min(pause, settings.sweep_seconds)
        except (SQLAlchemyError, ServiceError) as error:
            _logger.warning("collection failed: %s", error if isinstance(error, ServiceError) else type(error).__name__)
            pause = min(pause, _FAILURE_SECONDS)
        except Exception:  # see `maintain`
            _logger.exception("collection failed")
            pause = min(pause, _FAILURE_SECONDS)
        _pause(service, stop, pause)


def _pause(service: Service, stop: threading.Event, seconds: float) -> None:
    """Wait before the next collection, at most until a job was deleted, so that its space is free soon."""
    deadline = time.monotonic() + seconds
    while (remaining := deadline - time.monotonic()) > 0:
        if stop.wait(min(remaining, service.settings.sweep_seconds)):
            return
        with suppress(SQLAlchemyError), service.uow.reading() as session:
            if deletion.next_to_purge(session, START) is not None:
                return


def _collect_once(service: Service, collector: Collector, stop: threading.Event) -> bool:
    """Collect for a limited time, unless another process does. Returns False if there is more to collect."""
    with _lock(service, AdvisoryLock.COLLECTION) as is_locked:
        if not is_locked:
            return True
        collected = collector.run(_RUN_SECONDS, stop)
    _logger.info("%s", collected)
    return collected.complete


@contextmanager
def _lock(service: Service, lock: AdvisoryLock) -> Iterator[bool]:
    """Yields whether this process has the lock. It is held within the block, and freed if this process dies."""
    if service.uow.engine.dialect.name == "sqlite":
        with ExitStack() as stack:
            try:
                stack.enter_context(file_lock(service.settings.data_dir / _LOCK_FILES[lock]))
            except AlreadyRunningError:
                is_locked = False
            else:
                is_locked = True
            yield is_locked
        return

    with try_hold(service.uow.engine, lock) as is_locked:
        yield is_locked
