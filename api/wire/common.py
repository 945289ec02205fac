"""Responses shared by all resources: pages of lists and problems."""

from __future__ import annotations

from typing import Annotated, Generic, TypeVar

from pydantic import BaseModel, StringConstraints

T = TypeVar("T")
Links = dict[str, str]
PERSON_NAME_LENGTH = 100
PersonName = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=PERSON_NAME_LENGTH)]
"""The name of a reviewer or rater, without spaces around it."""


class ListOut(BaseModel, Generic[T]):
    """A page of a list."""

    data: list[T]
    has_more: bool
    next_cursor: str | None


class FieldError(BaseModel):
    """An error of one field; `pointer` is a JSON pointer into the body, or a parameter's name."""

    pointer: str
    message: str


class Problem(BaseModel):
    """An error (RFC 9457), sent as application/problem+json."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    errors: list[FieldError]
