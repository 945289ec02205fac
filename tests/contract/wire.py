"""HTTP over plain sockets, because a client library refuses to send what these tests send."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CLOSED = 0
"""Status of a connection that the service has closed without a response."""


@dataclass(frozen=True)
class Reply:
    """The first response on a connection, and how long it took."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace")

    def json(self) -> Any:
        return json.loads(self.body)


def request_bytes(
    method: str,
    target: str,
    headers: Sequence[tuple[str, str]] = (),
    body: bytes | None = None,
    host: str = "localhost",
) -> bytes:
    """Return a request as it is sent. Nothing is checked or escaped."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + (body or b"")


def exchange(port: int, request: bytes, limit_seconds: float) -> Reply:
    """Send a request on a new connection and read the response.

    Raises:
        TimeoutError: The service has neither responded nor closed the connection within the limit.
    """
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=limit_seconds) as connection:
        try:
            connection.sendall(request)
        except ConnectionError:
            pass  # the service may respond before it has read everything
        return read_reply(connection, started, request.split(b" ", 1)[0].decode("latin-1"))


def read_reply(connection: socket.socket, started: float, method: str = "GET") -> Reply:
    """Read the response to a request that was sent at the time `started` of the monotonic clock."""
    response = http.client.HTTPResponse(connection, method=method)
    try:
        response.begin()
        body = response.read()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Reply(response.status, headers, body, time.monotonic() - started)
    except (ConnectionError, http.client.HTTPException):
        return Reply(CLOSED, {}, b"", time.monotonic() - started)
    finally:
        response.close()
