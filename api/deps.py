"""Dependencies of the routes: the service, the caller and common parameters.

The functions are coroutines, although they await nothing, because FastAPI runs plain functions in a thread pool.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from datetime import datetime
from typing import Annotated, Self, cast

from fastapi import Depends, Header, Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from dfusion.errors import FieldsError, PromptItemsError
from dfusion.prompts.items import parse_marked
from dfusion.prompts.text import clean
from service.db.queries.pages import Period
from service.db.queries.results import ScoreFilter
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
    counts = Counter(name for name, _ in request.query_params.multi_items())
    for name, count in counts.items():
        if count > 1 and name not in _LIST_PARAMETERS:
            raise InvalidRequestError.at(f"/{name}", "expected one value, got several", "invalid_parameter")


_LIST_PARAMETERS = frozenset({"state", "kind", "role", "prompt", "run"})
"""Query parameters that select any of several values when they are repeated."""


class Parameters(BaseModel):
    """Base of a route's query parameters. Unknown parameters are errors."""

    model_config = ConfigDict(extra="forbid")


class PageParameters(Parameters):
    """Parameters of a paginated list."""

    limit: int = Field(50, ge=1, le=200)
    cursor: str | None = Field(None, max_length=200, description="`next_cursor` of the previous page")


def _read_time(text: object) -> datetime:
    """Parse a time with a time zone. Raises ValueError."""
    expected = "expected an ISO 8601 time with a time zone, such as 2026-01-31T12:00:00Z"
    try:
        time = datetime.fromisoformat(str(text))
    except ValueError:
        raise ValueError(f"{expected}, got {str(text)[:100]!r}; + is %2B in a URL") from None
    if time.tzinfo is None:
        raise ValueError(f"{expected}, got one without a time zone")
    return time


Time = Annotated[datetime, BeforeValidator(_read_time)]


class TimeParameters(PageParameters):
    """Filters by time of creation: from `created_after`, inclusive, to `created_before`, exclusive."""

    created_after: Time | None = Field(None, description="The earliest time")
    created_before: Time | None = Field(None, description="The first time after the period")

    @model_validator(mode="after")
    def _are_in_order(self) -> Self:
        if self.created_after and self.created_before and self.created_after > self.created_before:
            raise FieldsError("expected created_after <= created_before", "created_after")
        return self

    @property
    def created(self) -> Period:
        """The period. Stored times are rounded to microseconds, as in responses."""

        def bound(time: datetime | None) -> float | None:
            return None if time is None else time.timestamp() - _HALF_A_MICROSECOND

        return Period(bound(self.created_after), bound(self.created_before))


_HALF_A_MICROSECOND = 5e-7


Bound = Annotated[float, Field(allow_inf_nan=False)]


class ResultParameters(TimeParameters):
    """Filters of samples and pairs. A bound of scores needs a scorer."""

    prompt: list[Annotated[str, Field(min_length=1, max_length=1000)]] = Field(
        [], max_length=20, description="Text of the prompt, with or without brackets around its items; can be repeated"
    )
    scorer: str | None = Field(None, min_length=1, max_length=255, description="Only those with a score by this scorer")
    score_min: Bound | None = Field(None, description="The lowest score by the scorer; of pairs, of the target")
    score_max: Bound | None = Field(None, description="The highest score by the scorer; of pairs, of the target")

    @model_validator(mode="after")
    def _fit_the_scorer(self) -> Self:
        bounds = {"score_min": self.score_min, "score_max": self.score_max}
        given = [name for name, value in bounds.items() if value is not None]
        if given and self.scorer is None:
            raise FieldsError("expected a scorer, whose scores this bound applies to", *given)
        if self.score_min is not None and self.score_max is not None and self.score_min > self.score_max:
            raise FieldsError("expected score_min <= score_max", "score_min")
        return self

    @property
    def prompts(self) -> list[str]:
        """The texts as prompts store them: with or without brackets, in normal form C."""
        texts = dict.fromkeys(self.prompt)
        for text in self.prompt:
            texts[clean(text)] = None
            with suppress(PromptItemsError):
                texts[parse_marked(clean(text))[0]] = None
        return list(texts)

    @property
    def score(self) -> ScoreFilter | None:
        """The filter by score."""
        return None if self.scorer is None else ScoreFilter(self.scorer, self.score_min, self.score_max)


PromptSetFilter = Annotated[
    str | None, Field(max_length=100, description="Name of a prompt set (newest version) or id")
]
