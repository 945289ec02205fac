"""Liveness and readiness."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class HealthOut(BaseModel):
    """Liveness of the service."""

    status: str


CheckState = Literal["ok", "warning", "failed"]


class CheckOut(BaseModel):
    """A health check. `detail` is its result and, unless it is ok, a suggested fix."""

    name: str
    state: CheckState
    detail: str


class ReadyOut(BaseModel):
    """Readiness of the service.

    `unavailable`: an essential check has failed. `degraded`: another check has failed. `worker`: whether the embedded
    worker is alive; null without one.
    """

    status: Literal["ok", "degraded", "unavailable"]
    database: bool
    worker: bool | None
    checks: list[CheckOut]
