"""Bodies of forms, and the token that they need."""

from __future__ import annotations

from http import HTTPStatus
from urllib.parse import parse_qs

from fastapi import HTTPException, Request

from service import browser_sessions

_MAX_FIELDS = 200


async def read_form(request: Request) -> dict[str, str]:
    """The fields of a form, each once, without NUL characters. Raises HTTPException if it has too many."""
    body = (await request.body()).decode("utf-8", "replace")
    try:
        fields = parse_qs(body, keep_blank_values=True, max_num_fields=_MAX_FIELDS)
    except ValueError as error:
        raise HTTPException(HTTPStatus.BAD_REQUEST, f"expected at most {_MAX_FIELDS} fields") from error
    return {name: values[-1].replace("\0", "") for name, values in fields.items()}


def require_token(request: Request, form: dict[str, str]) -> None:
    """Raises HTTPException if the request has a session and the form lacks its token."""
    token: str | None = getattr(request.state, "session_token", None)
    if token is not None and not browser_sessions.is_csrf_token(token, form.get("csrf", "")):
        raise HTTPException(HTTPStatus.FORBIDDEN, "expected the form of this service's own page; reload the page")
