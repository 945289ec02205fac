"""Validation of request bodies before routing: size, coding, media type, strict JSON (no name twice), UTF-8 text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from email.message import Message
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

from fastapi.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as AsgiMessage

from api.errors import problem
from dfusion.errors import TextEncodingError
from dfusion.prompts.text import decode_utf8

TEXT_TYPES: Mapping[tuple[str, str], frozenset[str]] = MappingProxyType(
    {
        ("POST", "/prompt-sets"): frozenset({"text/plain", "text/csv"}),
        ("POST", "/sign-in"): frozenset({"application/x-www-form-urlencoded"}),
        ("POST", "/sign-out"): frozenset({"application/x-www-form-urlencoded"}),
        ("POST", "/rounds/new"): frozenset({"application/x-www-form-urlencoded"}),
    }
)
"""Media types that a body may have in addition to JSON, by method and path."""
BYTES_PER_VALUE = 8
"""JSON may have one value (object, list, text, number …) for each of these bytes of the limit. The largest valid
requests, thousands of prompts with items and thresholds, have fewer. Each value can be an error, and reporting half a
million of them keeps the service busy for seconds."""
_MAX_DEPTH = 100
_NO_NUL = "expected text without NUL characters"
_LARGE_BODY = 1 << 16
"""A larger body is checked in a thread, so that other requests do not wait."""


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

        error: Response | None = None
        if body is None:
            error = _too_large(f"{self._max_bytes} bytes")
        elif len(body) > _LARGE_BODY:
            error = await run_in_threadpool(self._body_error, request, body)
        elif body:
            error = self._body_error(request, body)

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

    def _body_error(self, request: Request, body: bytes) -> Response | None:
        """Return the error response for an invalid body, None for a valid one."""
        if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
            return _unsupported("a body without Content-Encoding", {"Accept-Encoding": "identity"})

        content_type = media_type(request)
        text_types = TEXT_TYPES.get((request.method, request.url.path), frozenset())

        if content_type in text_types:
            detail = _text_error(request, body)
            return problem(HTTPStatus.BAD_REQUEST, "malformed_text", detail) if detail else None

        if content_type != "application/json":
            return _unsupported(f"Content-Type: {' or '.join(('application/json', *sorted(text_types)))}")

        return json_error(body, self._max_bytes // BYTES_PER_VALUE)


def _too_large(expected: str) -> Response:
    detail = f"expected a body of at most {expected}"
    return problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body_too_large", detail)


def _unsupported(expected: str, headers: Mapping[str, str] = MappingProxyType({})) -> Response:
    return problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", f"expected {expected}", headers=headers)


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
        decode_utf8(body)
    except TextEncodingError as error:
        return str(error)
    return None


def json_error(body: bytes, max_values: int) -> Response | None:
    """Return the error response for a body that is not JSON in UTF-8 or has too many values, None for a valid one."""
    try:
        parsed = json.loads(decode_utf8(body), object_pairs_hook=_members)
        json.dumps(parsed, ensure_ascii=False).encode("utf-8")  # fails for lone surrogates, which cannot be stored
        values = list(_values(parsed))
    except TextEncodingError as error:
        return _malformed(str(error))
    except UnicodeError:
        return _malformed("expected text in UTF-8, got a lone surrogate")
    except (ValueError, RecursionError) as error:
        return _malformed(f"expected JSON: {error}")

    if len(values) > max_values:
        return _too_large(f"{max_values} JSON values")
    if any(isinstance(value, str) and "\0" in value for value in values):
        return _malformed(_NO_NUL)
    return None


def _malformed(detail: str) -> Response:
    return problem(HTTPStatus.BAD_REQUEST, "malformed_json", detail)


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("an object has a duplicate name")
    if any("\0" in name for name in members):
        raise ValueError(_NO_NUL)
    return members


def _values(parsed: Any) -> Iterator[Any]:
    """Yield all values of a document. Raises ValueError if it is nested too deeply."""
    level = [parsed]
    for _ in range(_MAX_DEPTH):
        yield from level
        level = [inner for value in level for inner in _inner_values(value)]
        if not level:
            return
    raise ValueError(f"nested more than {_MAX_DEPTH} levels deep")


def _inner_values(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that delivers the body again."""
    messages: list[AsgiMessage] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> AsgiMessage:
        return messages.pop() if messages else await receive()

    return replayed
