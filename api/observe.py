"""The outermost middleware: request id, security headers, access log and request metrics."""

from __future__ import annotations

import logging
import re
import secrets
import time
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.metrics import HttpMetrics
from service import logs

REQUEST_ID = "X-Request-Id"
_VALID_ID = re.compile(r"[A-Za-z0-9._-]{1,100}")
_CLIENT_GONE = 499
"""Status if the client disconnected before a response started, as in nginx."""
_NO_ROUTE = "none"
_QUIET = frozenset({"/healthz", "/readyz", "/metrics"})
"""Polled by machines every few seconds, therefore logged at debug level."""
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_POLICY = "default-src 'none'; frame-ancestors 'none'"
"""For data. Pages set their own."""
_logger = logging.getLogger("api.access")


class ObservabilityMiddleware:
    """Adds the request id and security headers, logs and counts each request.

    Headers that the application has set are not changed.
    """

    def __init__(self, app: ASGIApp, metrics: HttpMetrics) -> None:
        self.app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        request_id = _request_id(scope)
        started_at = time.perf_counter()
        status = _CLIENT_GONE

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _add_headers(MutableHeaders(scope=message), request_id)
            await send(message)

        with logs.about(request_id=request_id):
            try:
                await self.app(scope, receive, send_with_headers)
            finally:
                self._record(scope, status, time.perf_counter() - started_at)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path_format", _NO_ROUTE)
        self._metrics.count(scope["method"], route, status, seconds)

        level = logging.DEBUG if scope["path"] in _QUIET and status < HTTPStatus.BAD_REQUEST else logging.INFO
        caller = getattr(scope.get("state", {}).get("caller"), "key_id", None)
        data: dict[str, Any] = {
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(seconds, 4),
            "client": (scope.get("client") or ("",))[0],
        }
        if caller is not None:
            data["api_key_id"] = caller
        _logger.log(level, "%s %s %d", scope["method"], scope["path"], status, extra={"data": data})


def _request_id(scope: Scope) -> str:
    """Return the client's request id if it is valid, otherwise a new one."""
    client_id = Headers(scope=scope).get(REQUEST_ID, "")
    return client_id if _VALID_ID.fullmatch(client_id) else secrets.token_hex(16)


def _add_headers(headers: MutableHeaders, request_id: str) -> None:
    headers[REQUEST_ID] = request_id
    for name, value in _HEADERS.items():
        headers.setdefault(name, value)
    headers.setdefault("Content-Security-Policy", _POLICY)
