"""What the service looks at when it is asked whether it can work. A check is a function; add it to CHECKS."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sqlalchemy.exc import SQLAlchemyError

from api.core.queries import jobs, workers
from api.core.service import Service
from api.core.tables import Worker
from api.embedded import WorkerSupervisor
from api.schemas import CheckOut

Check = Callable[[Service, WorkerSupervisor | None], CheckOut]


def database(service: Service, _supervisor: WorkerSupervisor | None) -> CheckOut:
    """The database answers."""
    kind = service.uow.engine.dialect.name
    try:
        with service.uow.reading() as session:
            jobs.now(session)
    except SQLAlchemyError as error:
        what = f"{kind} does not answer ({type(error).__name__}): start it, or change DFUSION_DATABASE_URL"
        return CheckOut(name="database", state="wrong", detail=what)
    return CheckOut(name="database", state="ok", detail=f"{kind} answers")


def worker(service: Service, supervisor: WorkerSupervisor | None) -> CheckOut:
    """Somebody works: the worker that the service keeps, or others that have reported themselves lately."""
    if supervisor is not None and not supervisor.is_alive:
        return CheckOut(
            name="worker", state="wrong", detail="it has ended and is restarted: the service's log says why"
        )
    if supervisor is not None:
        return CheckOut(name="worker", state="ok", detail="the service's own runs")
    try:
        with service.uow.reading() as session:
            now, silent_after = jobs.now(session), 3 * service.settings.presence_seconds
            there = [one for one in workers.all_workers(session) if now - one.seen_at <= silent_after]
    except SQLAlchemyError:
        return CheckOut(name="worker", state="warning", detail="unknown without the database")
    if not there:
        return CheckOut(name="worker", state="warning", detail="none is there: jobs wait until one is started")
    return CheckOut(name="worker", state="ok", detail=f"{len(there)} there, on {_queues(there)}")


def _queues(there: Sequence[Worker]) -> str:
    return ", ".join(sorted({queue for one in there for queue in one.queues}))


CHECKS: tuple[Check, ...] = (database, worker)


def look(service: Service, supervisor: WorkerSupervisor | None) -> list[CheckOut]:
    """What all checks found, in order."""
    return [check(service, supervisor) for check in CHECKS]
