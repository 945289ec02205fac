"""The application on a port of 127.0.0.1, in a thread of the test process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from api.errors import problem


@contextmanager
def serving(app: ASGIApp, port: int = 0, **options: Any) -> Iterator[int]:
    """Serve `app` during the block on this port or a free one, with these options of uvicorn. Yields its port."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1, **options))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the service ended"
                time.sleep(0.01)
            yield int(listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(30)


class Busy:
    """Wraps `app`: rejects the next `times` requests with `status`, and records all in `seen` by method and path."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.times, self.status = 0, HTTPStatus.TOO_MANY_REQUESTS
        self.seen: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self.seen.append(f"{scope['method']} {scope['path']}")
        if self.times == 0:
            await self._app(scope, receive, send)
            return
        self.times -= 1
        await problem(self.status, "too_many_jobs", "come back later", headers={"Retry-After": "7"})(
            scope, receive, send
        )
