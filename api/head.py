"""HEAD requests for all paths that support GET: the same response without its body."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import routed_methods


class HeadMiddleware:
    """Handles HEAD requests as GET and ends the response after its headers, so that a stream is not read.

    Requests for paths with a HEAD route are passed on unchanged.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_head = scope["type"] == "http" and scope["method"] == "HEAD"
        if not is_head or "HEAD" in routed_methods(scope["app"], scope["path"]):
            await self._app(scope, receive, send)
            return

        has_headers = asyncio.Event()

        async def send_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body", "body": b""})
                has_headers.set()

        response = asyncio.ensure_future(self._app({**scope, "method": "GET"}, receive, send_headers))
        headers = asyncio.ensure_future(has_headers.wait())
        await asyncio.wait((response, headers), return_when=asyncio.FIRST_COMPLETED)
        for task in (response, headers):
            task.cancel()
        with suppress(asyncio.CancelledError):
            await response
