"""Dependencies of the routes: the service, the caller and common parameters.

The functions are coroutines, although they await nothing, because FastAPI runs plain functions in a thread pool.
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
"""A repeated request with the same key creates nothing; its response is the job created before."""


class Parameters(BaseModel):
    """Base of a route's query parameters. Unknown parameters are errors."""

    model_config = ConfigDict(extra="forbid")


class PageParameters(Parameters):
    """Parameters of a paginated list."""

    limit: int = Field(50, ge=1, le=200)
    cursor: str | None = Field(None, max_length=200, description="`next_cursor` of the previous page")


PromptSetFilter = Annotated[
    str | None, Field(max_length=100, description="Name of a prompt set (newest version) or id")
]
