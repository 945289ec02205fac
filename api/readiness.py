"""What the service looks at when it is asked whether it can work. A check is a function; add it to CHECKS.

Without its database, at another version's schema, or without the worker that it keeps itself, the service cannot work:
the check is ESSENTIAL. Whatever else is wrong leaves it of use, and every front of the installation alike, so it is
only told: messages are hints, that are sent again; stages wait for the storage and for room on the disk.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError

from redis import RedisError
from sqlalchemy.exc import SQLAlchemyError

from api.embedded import WorkerSupervisor
from api.wire.health import CheckOut, CheckState
from service import broker as redis
from service.db import migrate
from service.db.queries import jobs, workers
from service.errors import StorageError
from service.jobs import limits
from service.service import Service
from service.states import QueueName

_logger = logging.getLogger(__name__)
Check = Callable[[Service, WorkerSupervisor | None], CheckOut | None]
"""What was found; None where there is nothing to look at."""
_PATIENCE_SECONDS = 2.0


def _found(name: str, state: CheckState, detail: str) -> CheckOut:
    return CheckOut(name=name, state=state, detail=detail)


def database(service: Service, _supervisor: WorkerSupervisor | None) -> CheckOut:
    """The database answers."""
    kind = service.uow.engine.dialect.name
    try:
        with service.uow.reading() as session:
            jobs.now(session)
    except SQLAlchemyError as error:
        what = f"{kind} does not answer ({type(error).__name__}): start it, or change DFUSION_DATABASE_URL"
        return _found("database", "wrong", what)
    return _found("database", "ok", f"{kind} answers")


def migrations(service: Service, _supervisor: WorkerSupervisor | None) -> CheckOut:
    """The database has the tables of this version."""
    try:
        with service.uow.reading() as session:
            present, newest = migrate.revisions(session.connection())
    except SQLAlchemyError:
        return _found("migrations", "warning", "unknown without the database")
    if present != newest:
        have, want = (", ".join(sorted(one)) or "none" for one in (present, newest))
        fix = "run `python -m service.db.migrate`, or start the version that made it"
        return _found("migrations", "wrong", f"the schema is at {have}, this version's at {want}: {fix}")
    return _found("migrations", "ok", f"the schema is at {', '.join(newest)}")


def worker(service: Service, supervisor: WorkerSupervisor | None) -> CheckOut:
    """Somebody works: the worker that the service keeps, or others that have reported themselves lately."""
    if supervisor is not None and not supervisor.is_alive:
        return _found("worker", "wrong", "it has ended and is restarted: the service's log says why")
    if supervisor is not None:
        return _found("worker", "ok", "the service's own runs")
    try:
        with service.uow.reading() as session:
            now, silent_after = jobs.now(session), 3 * service.settings.presence_seconds
            there = [one for one in workers.all_workers(session) if now - one.seen_at <= silent_after]
    except SQLAlchemyError:
        return _found("worker", "warning", "unknown without the database")
    if not there:
        return _found("worker", "warning", "none is there: jobs wait until one is started")
    served = {queue for one in there for queue in one.queues}
    unserved = sorted(set(QueueName) - served)
    if unserved:
        what = f"{len(there)} there, none on {', '.join(unserved)}: what is queued there waits"
        return _found("worker", "warning", what)
    return _found("worker", "ok", f"{len(there)} there, on {', '.join(sorted(served))}")


def broker(service: Service, _supervisor: WorkerSupervisor | None) -> CheckOut | None:
    """Redis answers, where there is one."""
    if not service.settings.broker:
        return None
    try:
        redis.ping(service.settings)
    except (RedisError, OSError) as error:
        what = f"Redis does not answer ({type(error).__name__}): jobs wait until it is started; nothing is lost"
        return _found("broker", "wrong", what)
    return _found("broker", "ok", "Redis answers")


def storage(service: Service, _supervisor: WorkerSupervisor | None) -> CheckOut:
    """Artifacts can be stored."""
    try:
        service.store.probe()
    except StorageError as error:
        where = "DFUSION_S3_ENDPOINT and its keys" if service.settings.s3_endpoint else "DFUSION_DATA_DIR"
        return _found("storage", "wrong", f"{error}: look at {where}; stages are tried again meanwhile")
    return _found("storage", "ok", "S3 answers" if service.settings.s3_endpoint else "files can be written")


def disk(service: Service, _supervisor: WorkerSupervisor | None) -> CheckOut:
    """There is room to begin work."""
    try:
        free = f"{limits.free_disk_bytes(service.settings.data_dir) / 1e9:.1f} GB free"
        has_room = limits.has_disk_room(service.settings)
    except OSError as error:
        return _found("disk", "wrong", f"DFUSION_DATA_DIR cannot be looked at: {error.strerror}")
    if not has_room:
        return _found("disk", "wrong", f"{free}, less than DFUSION_MIN_FREE_DISK_MB: make room; no work begins before")
    return _found("disk", "ok", free)


CHECKS: dict[str, Check] = {
    "database": database,
    "migrations": migrations,
    "worker": worker,
    "broker": broker,
    "storage": storage,
    "disk": disk,
}
ESSENTIAL = frozenset({"database", "migrations", "worker"})


class Readiness:
    """All checks at once, each in a thread of its own: one that hangs holds up neither the answer nor the others.

    A check that goes on from an earlier look is not begun again, so that a server that hangs is not asked by ever
    more threads.
    """

    def __init__(
        self, service: Service, supervisor: WorkerSupervisor | None, patience_seconds: float = _PATIENCE_SECONDS
    ) -> None:
        self._service, self._supervisor, self._patience_seconds = service, supervisor, patience_seconds
        self._lock = threading.Lock()
        self._going_on: dict[str, Future[CheckOut | None]] = {}

    def look(self) -> list[CheckOut]:
        """What the checks found, in order."""
        deadline = time.monotonic() + self._patience_seconds
        begun = [(name, self._begun(name)) for name in CHECKS]
        found = (self._told(name, future, deadline) for name, future in begun)
        return [one for one in found if one is not None]

    def close(self) -> None:
        """Wait a moment for checks that still go on, so that they give their connections back before the end."""
        wait(self._going_on.values(), self._patience_seconds)

    def _begun(self, name: str) -> Future[CheckOut | None]:
        with self._lock:
            if (known := self._going_on.get(name)) is not None and not known.done():
                return known
            future = self._going_on[name] = Future[CheckOut | None]()
            threading.Thread(target=self._run, args=(CHECKS[name], future), name=f"check-{name}", daemon=True).start()
            return future

    def _run(self, check: Check, future: Future[CheckOut | None]) -> None:
        try:
            future.set_result(check(self._service, self._supervisor))
        except Exception as error:  # the waiting request reports it
            future.set_exception(error)

    def _told(self, name: str, future: Future[CheckOut | None], deadline: float) -> CheckOut | None:
        try:
            return future.result(max(0.0, deadline - time.monotonic()))
        except FutureTimeoutError:
            return _found(
                name, "wrong", f"no answer within {self._patience_seconds:g} s: it hangs, or cannot be reached"
            )
        except Exception as error:  # a check that fails is an answer, too
            _logger.warning("the check of %s failed", name, exc_info=error)
            return _found(name, "wrong", f"the check failed ({type(error).__name__}): the service's log says why")
