"""Bodies before anything reads them: counted while they stream in, and strict JSON (no NaN, no doubled names).

Where a route takes text, too, it is UTF-8.
"""

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
"""By method and path, the media types that a body may have beside JSON."""


class BodyGuard:
    """Middleware that answers a body that is too long, of another type, or no JSON, before a route sees it."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

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
            refusal: Response | None = problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body_too_large", detail)
        else:
            refusal = _refusal(request, body) if body else None
        await (refusal or self._app)(scope, receive if body is None else _replay(body, receive), send)

    async def _read(self, request: Request) -> bytes | None:
        """The body; None if it is too long."""
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared[:20]) > self._max_bytes:
            return None
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._max_bytes:
                return None
        return bytes(body)


def _refusal(request: Request, body: bytes) -> Response | None:
    """The answer to a body that its route cannot read."""
    sent = media_type(request)
    texts = TEXT_TYPES.get((request.method, request.url.path), frozenset())
    if sent in texts:
        wrong = _what_is_wrong_with_text(request, body)
        return problem(HTTPStatus.BAD_REQUEST, "malformed_text", wrong) if wrong else None
    if sent != "application/json":
        expected = " or ".join(("application/json", *sorted(texts)))
        detail = f"expected Content-Type: {expected}"
        return problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", detail)
    wrong = _what_is_wrong(body)
    return problem(HTTPStatus.BAD_REQUEST, "malformed_json", wrong) if wrong else None


def media_type(request: Request) -> str:
    """The Content-Type without its parameters; "" if there is none."""
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


def _what_is_wrong_with_text(request: Request, body: bytes) -> str | None:
    """Why `body` is not text in UTF-8, None if it is."""
    message = Message()
    message["content-type"] = request.headers.get("content-type", "")
    if message.get_content_charset("utf-8") not in ("utf-8", "us-ascii"):
        return "expected charset=utf-8"
    try:
        return "expected text without NUL characters" if "\0" in body.decode("utf-8") else None
    except UnicodeError:
        return "expected text in UTF-8"


def _what_is_wrong(body: bytes) -> str | None:
    """Why `body` is not JSON in UTF-8, None if it is."""
    try:
        parsed = json.loads(body.decode("utf-8-sig"), object_pairs_hook=_no_doubles)
        json.dumps(parsed, ensure_ascii=False).encode("utf-8")  # half a surrogate pair cannot be stored
        holds_nul = _holds_nul(parsed)
    except UnicodeError:
        return "expected text in UTF-8"
    except (ValueError, RecursionError) as error:
        return f"expected JSON: {error}"
    return "expected text without NUL characters" if holds_nul else None


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice in one object")
    return found


def _holds_nul(value: Any) -> bool:
    if isinstance(value, dict):
        return any("\0" in name or _holds_nul(inner) for name, inner in value.items())
    if isinstance(value, list):
        return any(_holds_nul(inner) for inner in value)
    return isinstance(value, str) and "\0" in value


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` as it was before the body was read."""
    messages: list[AsgiMessage] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> AsgiMessage:
        return messages.pop() if messages else await receive()

    return replayed
