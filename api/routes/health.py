"""Whether the service lives and can work."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response, status

from api.deps import ServiceDep
from api.readiness import look
from api.schemas import HealthOut, ReadyOut

router = APIRouter(tags=["health"])


@router.get("/healthz")
def health() -> HealthOut:
    """The service answers."""
    return HealthOut(status="ok")


@router.get(
    "/readyz",
    responses={status.HTTP_503_SERVICE_UNAVAILABLE: {"model": ReadyOut, "description": "What keeps it from working"}},
)
def ready(request: Request, response: Response, service: ServiceDep) -> ReadyOut:
    """200 if the service can work, 503 if not."""
    supervisor = request.app.state.supervisor
    checks = look(service, supervisor)
    states = {check.name: check.state for check in checks}
    fine = "wrong" not in states.values()
    if not fine:
        response.status_code = status.HTTP_503_SERVICE_UNAVAILABLE
    return ReadyOut(
        status="ok" if fine else "unavailable",
        database=states["database"] != "wrong",
        worker=None if supervisor is None else states["worker"] != "wrong",
        checks=checks,
    )
