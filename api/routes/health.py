"""Whether the service lives and can work."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response, status

from api.readiness import ESSENTIAL, Readiness
from api.wire.health import HealthOut, ReadyOut

router = APIRouter(tags=["health"])


@router.get("/healthz")
def health() -> HealthOut:
    """The service answers."""
    return HealthOut(status="ok")


@router.get(
    "/readyz",
    responses={status.HTTP_503_SERVICE_UNAVAILABLE: {"model": ReadyOut, "description": "What keeps it from working"}},
)
def ready(request: Request, response: Response) -> ReadyOut:
    """200 if the service can work, also where something that it can do without is wrong (`degraded`); 503 if not."""
    readiness: Readiness = request.app.state.readiness
    checks = readiness.look()
    wrong = {check.name for check in checks if check.state == "wrong"}
    if wrong & ESSENTIAL:
        response.status_code = status.HTTP_503_SERVICE_UNAVAILABLE
    return ReadyOut(
        status="unavailable" if wrong & ESSENTIAL else "degraded" if wrong else "ok",
        database="database" not in wrong,
        worker=None if request.app.state.supervisor is None else "worker" not in wrong,
        checks=checks,
    )
