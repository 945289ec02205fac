"""Whether the service is alive and ready."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class HealthOut(BaseModel):
    """Whether the service answers."""

    status: str


CheckState = Literal["ok", "warning", "wrong"]


class CheckOut(BaseModel):
    """One health check. `detail` is its result and, unless it is ok, a suggested fix."""

    name: str
    state: CheckState
    detail: str


class ReadyOut(BaseModel):
    """Whether the service can work (`unavailable`: it cannot; `degraded`: not all of it): its database answers, its
    worker (embedded mode) is alive, and what else it found when it looked."""

    status: Literal["ok", "degraded", "unavailable"]
    database: bool
    worker: bool | None
    checks: list[CheckOut]
