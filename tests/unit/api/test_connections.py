"""Requests that never end, and messages that are not HTTP. Served by uvicorn with `api.connections.Connection`."""

import logging
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from pydantic import SecretStr

from api.connections import Connection
from api.main import create_app
from tests.live_service import serving
from tests.service import settings_for

HEAD = b"POST /rounds HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
ADMIN = "dfk_" + "a1" * 20
KEY = f"Authorization: Bearer {ADMIN}\r\n".encode()


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder: Path = tmp_path_factory.mktemp("connections")
    app = create_app(settings_for(folder, folder / "tiny", auth=True, bootstrap_admin_key=SecretStr(ADMIN)))
    with serving(app, http=partial(Connection, request_seconds=0.3)) as opened:
        yield opened


def everything_after(port: int, sent: bytes) -> bytes:
    """All that the service sends until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(sent)
        received = b""
        while data := connection.recv(1 << 16):
            received += data
    return received


@pytest.mark.parametrize(
    "sent",
    [
        b"POST /rou",
        HEAD + KEY,
        HEAD + KEY + b'Content-Length: 1000\r\n\r\n{"model": ',
        HEAD + KEY + b'Transfer-Encoding: chunked\r\n\r\n64\r\n{"model": ',
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 9\r\n\r\n",
    ],
)
def test_a_request_that_does_not_end_in_time_is_408(port: int, sent: bytes) -> None:
    head, _, body = everything_after(port, sent).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert b"content-type: application/problem+json" in head.lower() and b"connection: close" in head.lower()
    assert b'"code":"request_timeout"' in body


def test_a_connection_without_a_request_is_closed(port: int) -> None:
    assert everything_after(port, b"") == b""


def test_the_rest_of_a_refused_request_is_not_awaited_for_ever(port: int) -> None:
    """The response to a request without a key comes before its body."""
    received = everything_after(port, HEAD + b"Content-Length: 1000\r\n\r\n{")
    assert received.startswith(b"HTTP/1.1 401 ")
    assert received.count(b"HTTP/1.1") == 1


def test_a_second_request_on_a_connection_has_the_limit_too(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        received = b""
        while not received.endswith(b"}"):
            received += connection.recv(1 << 16)
        assert received.startswith(b"HTTP/1.1 200 ")
        connection.sendall(HEAD + KEY)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\r\n\r\n",
        HEAD + KEY + b"Idempotency-Key: a\rb\r\n\r\n",
        HEAD + KEY + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_a_message_that_is_not_http_is_refused_as_a_problem(port: int, sent: bytes) -> None:
    head, _, body = everything_after(port, sent).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"content-type: application/problem+json" in head.lower()
    assert b'"code":"malformed_http"' in body


def test_malformed_chunks_after_the_response_are_no_error(port: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 401 ")
        connection.sendall(b"zz\r\n")
        while connection.recv(1 << 16):
            pass
    assert not [record for record in caplog.records if record.exc_info]
