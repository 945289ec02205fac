"""Whether the service lives and can work."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response, status
from sqlalchemy.exc import SQLAlchemyError

from api.core.queries import jobs
from api.deps import ServiceDep
from api.schemas import HealthOut, ReadyOut

router = APIRouter(tags=["health"])


@router.get("/healthz")
def health() -> HealthOut:
    """The service answers."""
    return HealthOut(status="ok")


@router.get("/readyz")
def ready(request: Request, response: Response, service: ServiceDep) -> ReadyOut:
    """200 if the service can work, 503 if not."""
    try:
        with service.uow.reading() as session:
            jobs.now(session)
        database = True
    except SQLAlchemyError:
        database = False
    supervisor = request.app.state.supervisor
    worker = None if supervisor is None else supervisor.is_alive
    fine = database and worker is not False
    if not fine:
        response.status_code = status.HTTP_503_SERVICE_UNAVAILABLE
    return ReadyOut(status="ok" if fine else "unavailable", database=database, worker=worker)
