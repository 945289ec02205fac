"""Rendering of templates. Every value is escaped; an undefined name is an error."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined

from api.pages import formats
from service import browser_sessions
from service.keys import Caller
from service.states import KeyScope

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
"""The Content-Security-Policy of the pages: no inline script or style, and nothing from other hosts."""

_HEADERS = {
    "Content-Security-Policy": POLICY,
    "Vary": "Cookie",
    "Referrer-Policy": "same-origin",  # with "no-referrer", forms would not name their origin
}

_environment = Environment(
    loader=PackageLoader("api.pages"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_environment.filters |= formats.FILTERS


def render(request: Request, template: str, status: int = HTTPStatus.OK, /, **values: Any) -> HTMLResponse:
    """Render a page.

    Args:
        request: The request; the page shows its caller's name and offers what the caller may do.
        template: The name of the template.
        status: The HTTP status.
        values: The variables of the template.

    Returns:
        The page.
    """
    caller: Caller | None = getattr(request.state, "caller", None)
    token: str | None = getattr(request.state, "session_token", None)
    scopes = caller.scopes if caller is not None else frozenset[KeyScope]()
    common = {
        "caller_name": caller.name if caller is not None and token is not None else None,
        "csrf": "" if token is None else browser_sessions.csrf_token(token),
        "has_session": token is not None,
        "is_known": token is not None or KeyScope.ADMIN in scopes,  # without keys, everyone has all scopes
        "may_administer": KeyScope.ADMIN in scopes,
        "may_review": KeyScope.REVIEW in scopes,
        "may_submit": KeyScope.SUBMIT in scopes,
        "path": request.url.path,
        "origin": str(request.base_url).rstrip("/"),
    }
    text = render_text(template, **common, **values)
    return HTMLResponse(text, status, _HEADERS)


def render_text(template: str, /, **values: Any) -> str:
    """Render a template with these variables."""
    return _environment.get_template(template).render(**values)
