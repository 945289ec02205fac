"""Readiness checks. A check is a function; add it to CHECKS.

The service cannot work without its database, with another version's schema, or without its embedded worker. These
checks are ESSENTIAL. Any other failure degrades the service but does not make it unavailable: broker messages are only
hints that are sent again, and stages wait for the storage and for disk space.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from itertools import chain

from sqlalchemy.exc import SQLAlchemyError

from api.embedded import WorkerSupervisor
from api.wire.health import CheckOut, CheckState
from service import broker as redis
from service.db import migrate
from service.db.clock import clock_problem
from service.db.queries import jobs, workers
from service.db.unit_of_work import reason_of
from service.errors import StorageError
from service.jobs import limits
from service.service import Service
from service.states import QueueName

_logger = logging.getLogger(__name__)
Check = Callable[[Service, WorkerSupervisor | None], CheckOut | None]
"""A check's result; None if the check does not apply."""
_TIMEOUT_SECONDS = 2.0
_FRESH_SECONDS = 1.0
"""How long results are cached, so that requests, which need no key, cannot overload the checks."""


def _result(name: str, state: CheckState, detail: str) -> CheckOut:
    return CheckOut(name=name, state=state, detail=detail)


def database(service: Service, _supervisor: WorkerSupervisor | None) -> CheckOut:
    """Check that the database responds, and that its clock agrees with that of this machine."""
    kind = service.uow.engine.dialect.name
    try:
        with service.uow.reading() as session:
            problem = clock_problem(session)
    except SQLAlchemyError as error:
        detail = f"{kind} does not respond ({reason_of(error)}): start it, or change DFUSION_DATABASE_URL"
        return _result("database", "failed", detail)
    if problem is not None:
        return _result("database", "warning", f"{kind} responds; {problem}")
    return _result("database", "ok", f"{kind} responds")


def migrations(service: Service, _supervisor: WorkerSupervisor | None) -> CheckOut:
    """Check that the database has this version's schema."""
    try:
        with service.uow.reading() as session:
            current, expected = map(_join_revisions, migrate.revisions(session.connection()))
    except SQLAlchemyError:
        return _result("migrations", "warning", "unknown without the database")

    if current != expected:
        fix = "run `python -m service.db.migrate`, or start the version that created the schema"
        return _result("migrations", "failed", f"expected the schema at revision {expected}, got {current}: {fix}")
    return _result("migrations", "ok", f"the schema is at revision {expected}")


def _join_revisions(revisions: Iterable[str]) -> str:
    return ", ".join(sorted(revisions)) or "none"


def worker(service: Service, supervisor: WorkerSupervisor | None) -> CheckOut:
    """Check that the embedded worker runs, or that workers have reported recently."""
    if supervisor is not None and not supervisor.is_alive:
        return _result("worker", "failed", "the embedded worker has ended and restarts; see the service's log")
    silent_after = service.settings.silent_seconds
    if supervisor is not None and supervisor.silent_seconds > silent_after:
        silence = f"the embedded worker has not responded for {supervisor.silent_seconds:.0f} s"
        return _result("worker", "failed", f"{silence}; the service will replace it")
    if supervisor is not None:
        return _result("worker", "ok", "the embedded worker runs")

    try:
        with service.uow.reading() as session:
            now = jobs.now(session)
            present = [row for row in workers.all_workers(session) if now - row.seen_at <= silent_after]
    except SQLAlchemyError:
        return _result("worker", "warning", "unknown without the database")

    if not present:
        return _result("worker", "warning", "no worker runs: jobs wait until one starts")
    served = set(chain.from_iterable(row.queues for row in present))
    unserved = sorted(set(QueueName) - served)
    if unserved:
        detail = f"{len(present)} running, none serves {', '.join(unserved)}: stages in these queues wait"
        return _result("worker", "warning", detail)
    return _result("worker", "ok", f"{len(present)} running, serving {', '.join(sorted(served))}")


def broker(service: Service, _supervisor: WorkerSupervisor | None) -> CheckOut | None:
    """Check that Redis responds, if the settings name one."""
    if not service.settings.broker:
        return None
    from redis import RedisError

    try:
        redis.ping(service.settings)
    except (RedisError, OSError) as error:
        detail = (
            f"Redis does not respond ({type(error).__name__}): start it, or change DFUSION_BROKER_URL; jobs wait "
            "until then, and nothing is lost"
        )
        return _result("broker", "failed", detail)
    return _result("broker", "ok", "Redis responds")


def storage(service: Service, _supervisor: WorkerSupervisor | None) -> CheckOut:
    """Check that artifacts can be stored."""
    try:
        service.store.probe()
    except StorageError as error:
        settings = "DFUSION_S3_ENDPOINT and its keys" if service.settings.s3_endpoint else "DFUSION_DATA_DIR"
        return _result("storage", "failed", f"{error}: check {settings}; stages are retried until it works")
    return _result("storage", "ok", "S3 responds" if service.settings.s3_endpoint else "files can be written")


def disk(service: Service, _supervisor: WorkerSupervisor | None) -> CheckOut:
    """Check that there is enough disk space to start work."""
    try:
        free = f"{limits.free_disk_bytes(service.settings.data_dir) / 1e9:.1f} GB free"
        has_room = limits.has_disk_room(service.settings)
    except OSError as error:
        return _result("disk", "failed", f"DFUSION_DATA_DIR cannot be read: {error.strerror}")

    if not has_room:
        detail = f"{free}, less than DFUSION_MIN_FREE_DISK_MB: free some space; until then no work starts"
        return _result("disk", "failed", detail)
    return _result("disk", "ok", free)


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
    """Runs all checks at once, each in its thread, so that a check that hangs delays no other.

    A check that still runs from an earlier call is not started again. So the number of threads stays bounded while a
    server hangs.
    """

    def __init__(
        self, service: Service, supervisor: WorkerSupervisor | None, timeout_seconds: float = _TIMEOUT_SECONDS
    ) -> None:
        self._service = service
        self._supervisor = supervisor
        self._timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._running: dict[str, Future[CheckOut | None]] = {}
        self._results: list[CheckOut] = []
        self._fresh_until = 0.0

    def run_checks(self) -> list[CheckOut]:
        """Return the results of the checks that apply, in order, at most a second old.

        Returns after the timeout at the latest.
        """
        with self._lock:
            if time.monotonic() < self._fresh_until:
                return self._results

        deadline = time.monotonic() + self._timeout_seconds
        futures = {name: self._start(name) for name in CHECKS}

        results = []
        for name, future in futures.items():
            result = self._wait_for(name, future, deadline)
            if result is not None:
                results.append(result)
        with self._lock:
            self._results = results
            self._fresh_until = time.monotonic() + _FRESH_SECONDS
        return results

    def close(self) -> None:
        """Wait for running checks until the timeout, so that they return their database connections."""
        wait(self._running.values(), self._timeout_seconds)

    def _start(self, name: str) -> Future[CheckOut | None]:
        with self._lock:
            if (running := self._running.get(name)) is not None and not running.done():
                return running
            future = self._running[name] = Future[CheckOut | None]()
            threading.Thread(target=self._run, args=(CHECKS[name], future), name=f"check-{name}", daemon=True).start()
            return future

    def _run(self, check: Check, future: Future[CheckOut | None]) -> None:
        try:
            future.set_result(check(self._service, self._supervisor))
        except Exception as error:  # the waiting request reports it
            future.set_exception(error)

    def _wait_for(self, name: str, future: Future[CheckOut | None], deadline: float) -> CheckOut | None:
        try:
            return future.result(max(0.0, deadline - time.monotonic()))
        except FutureTimeoutError:
            detail = f"no response within {self._timeout_seconds:g} s: the server hangs or is unreachable"
            return _result(name, "failed", detail)
        except Exception as error:  # a failed check is a result
            _logger.warning("readiness check %s failed", name, exc_info=error)
            return _result(name, "failed", f"the check failed ({type(error).__name__}); see the service's log")
