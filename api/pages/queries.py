"""Query strings of the pages: filters of forms, and links that keep them."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

from pydantic import BaseModel, model_validator

_OF_THE_PAGE = frozenset({"cursor", "limit"})


class FormParameters(BaseModel):
    """Base of parameters that a form sends, in which fields that were left empty mean nothing."""

    @model_validator(mode="before")
    @classmethod
    def _without_blanks(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        values = {name: _without_blank_items(value) for name, value in given.items()}
        return {name: value for name, value in values.items() if value not in ("", [])}


def _without_blank_items(value: Any) -> Any:
    return [item for item in value if item != ""] if isinstance(value, list) else value


def filters_of(parameters: BaseModel) -> dict[str, Any]:
    """The filters that are set, by name, without the position in the list."""
    given = parameters.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return {name: value for name, value in given.items() if name not in _OF_THE_PAGE}


def link(path: str, filters: dict[str, Any], **more: str | None) -> str:
    """A link to a list with filters. Values that are None are left out."""
    values = {name: _text(value) for name, value in (filters | more).items() if value is not None}
    return f"{path}?{urlencode(values, doseq=True)}" if values else path


def page_links(
    path: str, filters: dict[str, Any], cursor: str | None, next_cursor: str | None
) -> dict[str, str | None]:
    """The links of a page of a list: `next_url`, None on the last page, and `first_url`, None on the first one."""
    return {
        "next_url": link(path, filters, cursor=next_cursor) if next_cursor else None,
        "first_url": link(path, filters) if cursor else None,
    }


def _text(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value
