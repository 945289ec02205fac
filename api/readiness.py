"""What the service looks at when it is asked whether it can work. A check is a function; add it to CHECKS."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError

from api.core.queries import jobs
from api.core.service import Service
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


def worker(_service: Service, supervisor: WorkerSupervisor | None) -> CheckOut:
    """The worker that the service keeps is alive."""
    if supervisor is None:
        return CheckOut(name="worker", state="ok", detail="the service keeps none of its own")
    if supervisor.is_alive:
        return CheckOut(name="worker", state="ok", detail=f"the service's own runs, process {supervisor.pid}")
    return CheckOut(name="worker", state="wrong", detail="it has ended and is restarted: the service's log says why")


CHECKS: tuple[Check, ...] = (database, worker)


def look(service: Service, supervisor: WorkerSupervisor | None) -> list[CheckOut]:
    """What all checks found, in order."""
    return [check(service, supervisor) for check in CHECKS]
