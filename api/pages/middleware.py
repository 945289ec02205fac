"""Middleware of the pages: `Vary`, and errors as pages for requests that prefer HTML."""

from __future__ import annotations

import json
from collections.abc import Iterable
from http import HTTPStatus
from re import Pattern
from typing import Any
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import RedirectResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.access import SIGN_IN_PATH
from api.errors import MEDIA_TYPE
from api.pages.negotiation import prefers_html
from api.pages.render import render

_MAX_NEXT = 1000
_KEPT = frozenset({"retry-after", "allow"})


class PagesMiddleware:
    """Adds `Vary: Accept` to the responses of paths that have a page, and turns problems into pages.

    A request without access is redirected to the sign-in page.
    """

    def __init__(self, app: ASGIApp, paths: Iterable[Pattern[str]], requires_keys: bool) -> None:
        self._app = app
        self._paths = tuple(paths)
        self._requires_keys = requires_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        sender = _ProblemPages(self, scope, receive, send) if prefers_html(scope) else None
        varies = sender is not None or any(path.fullmatch(scope["path"]) for path in self._paths)

        async def send_with_vary(message: Message) -> None:
            if varies and message["type"] == "http.response.start":
                MutableHeaders(scope=message).add_vary_header("Accept")
            await (sender.send if sender is not None else send)(message)

        await self._app(scope, receive, send_with_vary)

    def page(self, request: Request, status: int, problem: dict[str, Any]) -> Response:
        """The page for a problem."""
        if status == HTTPStatus.UNAUTHORIZED and self._requires_keys:
            return RedirectResponse(sign_in_address(request), HTTPStatus.SEE_OTHER)
        return render(
            request,
            "error.html",
            status,
            status=int(status),
            title=HTTPStatus(status).phrase,
            detail=str(problem.get("detail", "")),
        )


def sign_in_address(request: Request) -> str:
    """The address of the sign-in page that leads back to the page of the request."""
    target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    if target == "/" or len(target) > _MAX_NEXT:
        return SIGN_IN_PATH
    return f"{SIGN_IN_PATH}?next={quote(target, safe='')}"


class _ProblemPages:
    """Sends a response; a problem is sent as its page."""

    def __init__(self, middleware: PagesMiddleware, scope: Scope, receive: Receive, send: Send) -> None:
        self._middleware = middleware
        self._scope = scope
        self._receive = receive
        self._send = send
        self._start: Message | None = None
        self._body = b""

    async def send(self, message: Message) -> None:
        """Send the message, or keep it while a problem is not complete."""
        if message["type"] == "http.response.start":
            headers = Headers(raw=message["headers"])
            if headers.get("content-type") == MEDIA_TYPE:
                self._start = message
                return
        if self._start is None:
            await self._send(message)
            return

        self._body += message.get("body", b"")
        if not message.get("more_body", False):
            await self._send_page(self._start)

    async def _send_page(self, start: Message) -> None:
        problem = json.loads(self._body) if self._body else {}
        response = self._middleware.page(Request(self._scope), start["status"], problem)
        for name, value in Headers(raw=start["headers"]).items():
            if name in _KEPT:
                response.headers[name] = value
        response.headers.add_vary_header("Accept")
        await response(self._scope, self._receive, self._send)
