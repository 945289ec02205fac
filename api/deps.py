"""What routes are given: the service, the caller, and a list's limit and cursor.

These functions are coroutines, though they wait for nothing: plain ones would each be sent to a thread and back.
"""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import Depends, Header, Request
from pydantic import BaseModel, ConfigDict, Field

from service.keys import Caller
from service.service import Service


async def _service(request: Request) -> Service:
    return cast(Service, request.app.state.service)


ServiceDep = Annotated[Service, Depends(_service)]


async def _caller(request: Request) -> Caller:
    return cast(Caller, request.state.caller)


CallerDep = Annotated[Caller, Depends(_caller)]


IdempotencyKey = Annotated[str | None, Header(min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$")]
"""Under the same key the same request makes nothing new: it is answered with the job that it made before."""


class Parameters(BaseModel):
    """Base of a route's query parameters: an unknown one is an error, not silence."""

    model_config = ConfigDict(extra="forbid")


class PageParameters(Parameters):
    """Which page of a list."""

    limit: int = Field(50, ge=1, le=200)
    cursor: str | None = Field(None, max_length=200, description="`next_cursor` of the page before")


PromptSetFilter = Annotated[
    str | None, Field(max_length=100, description="The name of a prompt set (its newest version), or an id")
]
