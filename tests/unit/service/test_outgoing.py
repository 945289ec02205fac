"""Requests to addresses of users reach the public internet alone."""

import socket
import threading
import time
from ipaddress import ip_address
from typing import Any

import pytest

from service import outgoing
from service.errors import AddressRefusedError, OutgoingError
from service.outgoing import check_url, post, require_allowed
from tests.receivers import receiving


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.8.8",
        "0.0.0.0",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "192.0.2.1",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "fe80::1",
        "fc00::1",
        "fd12::1",
        "ff02::1",
        "2001:db8::1",
        "::ffff:10.0.0.1",
        "::ffff:127.0.0.1",
        "64:ff9b::10.0.0.1",
        "64:ff9b::a9fe:a9fe",
        "2002:a00:1::1",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    ],
)
def test_an_address_that_is_not_public_is_refused(address: str) -> None:
    with pytest.raises(AddressRefusedError, match="public address"):
        require_allowed(ip_address(address), allow_loopback=False)
    host = f"[{address}]" if ":" in address else address
    with pytest.raises(AddressRefusedError):
        check_url(f"https://{host}/hook", allow_loopback=False)


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"]
)
def test_a_public_address_is_allowed(address: str) -> None:
    require_allowed(ip_address(address), allow_loopback=False)


@pytest.mark.parametrize("address", ["10.0.0.1", "169.254.169.254", "::ffff:192.168.0.1"])
def test_the_setting_for_tests_allows_loopback_alone(address: str) -> None:
    require_allowed(ip_address("127.0.0.1"), allow_loopback=True)
    with pytest.raises(AddressRefusedError):
        require_allowed(ip_address(address), allow_loopback=True)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "/hook",
        "example.org/hook",
        "http://example.org/hook",
        "ftp://example.org/hook",
        "file:///etc/passwd",
        "https://",
        "https:///hook",
        "https://user:password@example.org/hook",
        "https://example.org@10.0.0.1/hook",
        "https://example.org/#part",
        "https://example.org:0/hook",
        "https://example.org:99999/hook",
        "https://example.org:x/hook",
        "https://[::1/hook",
        "https://example.org/a b",
        "https://example.org/a\nHost: x",
        "https://bücher.example/hook",
        "https://example.org/" + "x" * 2000,
        "http://127.0.0.1/hook",
    ],
)
def test_a_url_without_tls_or_in_another_form_is_refused(url: str) -> None:
    with pytest.raises(AddressRefusedError):
        check_url(url, allow_loopback=False)


def test_a_url_with_tls_is_allowed() -> None:
    check_url("https://example.org:8443/hook?token=1", allow_loopback=False)
    check_url("http://localhost:8080/hook", allow_loopback=True)
    with pytest.raises(AddressRefusedError, match="https"):
        check_url("http://example.org/hook", allow_loopback=True)


def test_the_address_that_is_connected_to_is_the_one_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    addresses = {"private.example": ["127.0.0.1"], "mixed.example": ["93.184.215.14", "127.0.0.1"]}

    def resolve(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses[host]]

    with receiving() as receiver:
        monkeypatch.setattr(outgoing.socket, "getaddrinfo", resolve)
        for host in addresses:
            with pytest.raises(AddressRefusedError, match="public address"):
                post(f"https://{host}:{receiver.port}/hook", {}, b"{}")
        assert (asked, receiver.requests) == (["private.example", "mixed.example"], [])


def test_a_connection_to_another_address_than_the_checked_one_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as receiver:
        own = socket.create_connection
        monkeypatch.setattr(
            socket,
            "create_connection",
            lambda _address, *rest, **more: own(("127.0.0.1", receiver.port), *rest, **more),
        )
        with pytest.raises(AddressRefusedError, match="public address"):
            post("https://93.184.215.14/hook", {}, b"{}")
        assert receiver.requests == []


def test_a_redirect_is_not_followed() -> None:
    with receiving() as receiver:
        receiver.status, receiver.location = 307, receiver.url
        assert post(receiver.url, {}, b"{}", allow_loopback=True) == 307
        assert len(receiver.requests) == 1


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "ALL_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with receiving() as receiver:
        assert post(receiver.url, {"x-a": "b"}, b"{}", allow_loopback=True) == 204
        assert receiver.requests[0][0]["x-a"] == "b"


def test_a_server_without_tls_gets_nothing() -> None:
    with receiving() as receiver:
        with pytest.raises(OutgoingError, match="TLS error"):
            post(f"https://127.0.0.1:{receiver.port}/hook", {}, b"secret", allow_loopback=True)
        assert receiver.requests == []


def test_a_trickle_of_bytes_does_not_prolong_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outgoing, "_TOTAL_SECONDS", 0.5)

    def trickle(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            try:
                for _ in range(100):
                    connection.sendall(b"HTTP/1.1 200 OK\r\nX: " if _ == 0 else b"y")
                    time.sleep(0.1)
            except OSError:
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=trickle, args=(listener,))
        thread.start()
        begun = time.monotonic()
        with pytest.raises(OutgoingError, match="ReadTimeout"):
            post(f"http://127.0.0.1:{listener.getsockname()[1]}/", {}, b"{}", allow_loopback=True)
        assert time.monotonic() - begun < 3
        thread.join()
