"""Validation of request bodies before routing: size, media type, strict JSON (no duplicate names), UTF-8 text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from email.message import Message
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as AsgiMessage

from api.errors import problem

TEXT_TYPES: Mapping[tuple[str, str], frozenset[str]] = MappingProxyType(
    {("POST", "/prompt-sets"): frozenset({"text/plain", "text/csv"})}
)
"""Media types that a body may have in addition to JSON, by method and path."""


class BodyValidationMiddleware:
    """Rejects bodies that are too large, have another media type or are not valid JSON."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        request = Request(scope, receive)
        try:
            body = await self._read(request)
        except ClientDisconnect:
            return

        if body is None:
            detail = f"expected a body of at most {self._max_bytes} bytes"
            error: Response | None = problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body_too_large", detail)
        else:
            error = _body_error(request, body) if body else None

        await (error or self._app)(scope, receive if body is None else _replay(body, receive), send)

    async def _read(self, request: Request) -> bytes | None:
        """Read the body. Returns None if it is too large."""
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared[:20]) > self._max_bytes:
            return None

        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._max_bytes:
                return None
        return bytes(body)


def _body_error(request: Request, body: bytes) -> Response | None:
    """Return the error response for an invalid body, None for a valid one."""
    content_type = media_type(request)
    text_types = TEXT_TYPES.get((request.method, request.url.path), frozenset())

    if content_type in text_types:
        detail = _text_error(request, body)
        return problem(HTTPStatus.BAD_REQUEST, "malformed_text", detail) if detail else None

    if content_type != "application/json":
        expected = " or ".join(("application/json", *sorted(text_types)))
        detail = f"expected Content-Type: {expected}"
        return problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", detail)

    detail = _json_error(body)
    return problem(HTTPStatus.BAD_REQUEST, "malformed_json", detail) if detail else None


def media_type(request: Request) -> str:
    """Return the Content-Type without its parameters; "" without the header."""
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


def _text_error(request: Request, body: bytes) -> str | None:
    """Describe why `body` is not UTF-8 text. Returns None if it is."""
    message = Message()
    message["content-type"] = request.headers.get("content-type", "")
    if message.get_content_charset("utf-8") not in ("utf-8", "us-ascii"):
        return "expected charset=utf-8"
    try:
        return "expected text without NUL characters" if "\0" in body.decode("utf-8") else None
    except UnicodeError:
        return "expected text in UTF-8"


def _json_error(body: bytes) -> str | None:
    """Describe why `body` is not JSON in UTF-8. Returns None if it is."""
    try:
        parsed = json.loads(body.decode("utf-8-sig"), object_pairs_hook=_reject_duplicates)
        json.dumps(parsed, ensure_ascii=False).encode("utf-8")  # fails for lone surrogates, which cannot be stored
        has_nul = _contains_nul(parsed)
    except UnicodeError:
        return "expected text in UTF-8"
    except (ValueError, RecursionError) as error:
        return f"expected JSON: {error}"
    return "expected text without NUL characters" if has_nul else None


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("an object contains a name twice")
    return members


def _contains_nul(value: Any) -> bool:
    if isinstance(value, dict):
        return any("\0" in name or _contains_nul(inner) for name, inner in value.items())
    if isinstance(value, list):
        return any(_contains_nul(inner) for inner in value)
    return isinstance(value, str) and "\0" in value


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that delivers the body again."""
    messages: list[AsgiMessage] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> AsgiMessage:
        return messages.pop() if messages else await receive()

    return replayed
