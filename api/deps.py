"""Dependencies of the routes: the service, the caller and common parameters.

The functions are coroutines, although they await nothing, because FastAPI runs plain functions in a thread pool.
"""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import Depends, Header, Request
from pydantic import BaseModel, ConfigDict, Field

from service.errors import InvalidRequestError
from service.keys import Caller
from service.service import Service


async def _service(request: Request) -> Service:
    return cast(Service, request.app.state.service)


def is_stopping(request: Request) -> bool:
    """Whether the service was asked to stop, so that long responses must end."""
    return bool(request.app.state.is_stopping)


ServiceDep = Annotated[Service, Depends(_service)]


async def _caller(request: Request) -> Caller:
    return cast(Caller, request.state.caller)


CallerDep = Annotated[Caller, Depends(_caller)]


IdempotencyKey = Annotated[str | None, Header(min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$")]
"""A repeated request with the same key creates nothing; its response is the existing job."""


async def refuse_repeated_parameters(request: Request) -> None:
    """Raises InvalidRequestError for a repeated query parameter, of which all values but the last would be ignored."""
    names = [name for name, _ in request.query_params.multi_items()]
    for name in dict.fromkeys(names):
        if names.count(name) > 1 and name not in _LIST_PARAMETERS:
            raise InvalidRequestError.at(f"/{name}", "expected one value, got several", "invalid_parameter")


_LIST_PARAMETERS = frozenset({"state", "kind"})
"""Query parameters that select any of several values when they are repeated."""


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
