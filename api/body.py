"""Bodies before anything reads them: counted while they stream in, and strict JSON (no NaN, no doubled names)."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import problem


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
            response = problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body_too_large", detail)
        elif body and not _is_json(request):
            detail = "expected Content-Type: application/json"
            response = problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", detail)
        elif body and (wrong := _what_is_wrong(body)):
            response = problem(HTTPStatus.BAD_REQUEST, "malformed_json", wrong)
        else:
            await self._app(scope, _replay(body, receive), send)
            return
        await response(scope, receive, send)

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


def _is_json(request: Request) -> bool:
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    return media_type == "application/json"


def _what_is_wrong(body: bytes) -> str | None:
    """Why `body` is not JSON in UTF-8, None if it is."""
    try:
        parsed = json.loads(body.decode("utf-8"), object_pairs_hook=_no_doubles)
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
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed
