"""Routes for liveness and readiness."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response, status

from api.readiness import ESSENTIAL, Readiness
from api.wire.health import HealthOut, ReadyOut

router = APIRouter(tags=["health"])


@router.get("/healthz")
def health() -> HealthOut:
    """Liveness: the service responds."""
    return HealthOut(status="ok")


@router.get(
    "/readyz",
    responses={status.HTTP_503_SERVICE_UNAVAILABLE: {"model": ReadyOut, "description": "An essential check failed"}},
)
def ready(request: Request, response: Response) -> ReadyOut:
    """Readiness: 503 if an essential check fails, 200 otherwise (`degraded` if another check fails)."""
    readiness: Readiness = request.app.state.readiness
    checks = readiness.run_checks()
    failed = {check.name for check in checks if check.state == "failed"}

    if failed & ESSENTIAL:
        response.status_code = status.HTTP_503_SERVICE_UNAVAILABLE
    return ReadyOut(
        status="unavailable" if failed & ESSENTIAL else "degraded" if failed else "ok",
        database="database" not in failed,
        worker=None if request.app.state.supervisor is None else "worker" not in failed,
        checks=checks,
    )
