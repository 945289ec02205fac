"""The program of the service: serves the application, in one process or several, until it is stopped."""

from __future__ import annotations

import gc
import math
import signal
import socket
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

import uvicorn
from fastapi import FastAPI

from api.connections import Connection
from api.main import create_app
from api.metrics import HttpMetrics
from api.processes import ProcessGroup, require_shareable
from service import logs
from service.errors import StartError
from service.pulse import Pulse
from service.settings import Settings

_BACKLOG = 2048
"""Connections that wait until a process accepts them, as uvicorn's default."""


class _Server(uvicorn.Server):
    """A server whose long responses, such as event streams, end when it is asked to stop.

    While it serves requests, its pulse beats ten times a second.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI, pulse: Pulse | None = None) -> None:
        super().__init__(config)
        self._app = app
        self._pulse = pulse

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._app.state.is_stopping = True
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():  # shared by several processes, which accept one connection at a time
            listener.listen(_BACKLOG)

    async def on_tick(self, counter: int) -> bool:
        if self._pulse is not None:
            self._pulse.beat()
        return await super().on_tick(counter)


def require_address(settings: Settings) -> None:
    """Raises StartError if the service cannot listen on the address of the settings."""
    try:
        family, *_, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address[:2], family=family).close()
    except OSError as error:
        address_set = f"DFUSION_HOST={settings.host}, DFUSION_PORT={settings.port}"
        raise StartError(f"{address_set}: cannot listen there: {error.strerror or error}") from error


def main() -> None:
    """Serve until stopped."""
    settings = Settings.or_exit()
    logs.configure(settings)
    with ExitStack() as stack:
        folder = None
        if settings.api_processes > 1:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="dfusion-metrics-")))
        app = _create_app(settings, folder)

        # a large request makes so many objects that all others are searched for garbage several times, which takes as
        # long as the request; those that exist now stay until the end
        gc.collect()
        gc.freeze()

        # uvicorn raises the signal again after its shutdown; exit code 0, because a requested stop is no failure
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            http=partial(Connection, request_seconds=settings.request_seconds),  # type: ignore[arg-type]  # a factory
            ws="none",
            # asyncio accepts up to this many connections in a row: one process would take a whole burst of them
            backlog=_BACKLOG if folder is None else 1,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=math.ceil(settings.shutdown_seconds),
        )
        if folder is None:
            _Server(config, app).run()
        else:
            listener = config.bind_socket()
            sys.exit(ProcessGroup(settings, partial(_serve, config, app, listener)).run())


def _create_app(settings: Settings, folder: Path | None) -> FastAPI:
    """Create the application. Exits with a message if the settings do not allow it to start.

    Args:
        settings: The settings.
        folder: Where several processes count their requests; None if there is one process.
    """
    try:
        require_shareable(settings)
        app = create_app(settings, HttpMetrics(folder))
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        require_address(settings)
    except StartError as error:
        raise SystemExit(f"cannot start: {error}") from error
    except OSError as error:
        raise SystemExit(f"cannot start: DFUSION_DATA_DIR: {settings.data_dir}: {error.strerror}") from error
    return app


def _serve(config: uvicorn.Config, app: FastAPI, listener: socket.socket, number: int, pulse: Pulse) -> None:
    """Serve requests as one of several processes."""
    app.state.metrics.process = number
    _Server(config, app, pulse).run([listener])
