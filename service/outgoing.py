"""HTTP requests to addresses that users name.

Such a request must not reach this network (server-side request forgery). So a name is resolved once, each of its
addresses is checked, and the connection goes to a checked address: a name that resolves differently a moment later
(DNS rebinding) changes nothing. Redirects are not followed, and proxies of the environment are not used.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Any
from urllib.parse import urlsplit

import httpcore

from service.errors import AddressRefusedError, OutgoingError

MAX_URL_LENGTH = 2000
_NAT64 = IPv6Network("64:ff9b::/96")
_TOTAL_SECONDS = 10.0
"""Time for a whole request, from the connection to the status of the response."""


def check_url(url: str, allow_loopback: bool) -> None:
    """Check a URL for `post`, except where its host name leads.

    Args:
        url: The URL.
        allow_loopback: Also allow this machine, without TLS.

    Raises:
        AddressRefusedError: The URL is malformed, has no TLS, or names an address that is not public.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        port = parts.port
    except ValueError as error:
        raise AddressRefusedError("expected an absolute URL with https://") from error

    is_plain = url.isascii() and url.isprintable() and " " not in url and len(url) <= MAX_URL_LENGTH
    if not is_plain or not host or port == 0 or parts.fragment or "@" in parts.netloc:
        raise AddressRefusedError(
            f"expected an absolute URL of at most {MAX_URL_LENGTH} ASCII characters, without a user or a fragment"
        )

    try:
        address = ip_address(host)
    except ValueError:
        is_loopback = host == "localhost"
    else:
        is_loopback = address.is_loopback
        require_allowed(address, allow_loopback)
    if parts.scheme != "https" and not (allow_loopback and is_loopback and parts.scheme == "http"):
        raise AddressRefusedError("expected https://")


def require_allowed(address: IPv4Address | IPv6Address, allow_loopback: bool) -> None:
    """Raises AddressRefusedError if the address is not one of the public internet."""
    if allow_loopback and address.is_loopback:
        return
    if not _is_public(address):
        raise AddressRefusedError("expected a public address, got one of a private, local or reserved network")


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether the address is unicast on the public internet. Addresses that contain an IPv4 address count as that."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return _is_public(address.ipv4_mapped)
        if address in _NAT64:
            return _is_public(IPv4Address(int(address) & 0xFFFF_FFFF))
        if address.sixtofour is not None or address.teredo is not None:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def post(url: str, headers: Mapping[str, str], body: bytes, allow_loopback: bool = False) -> int:
    """Send a POST request. The body of the response is not read.

    Args:
        url: The URL; see `check_url`.
        headers: The headers of the request.
        body: Its body.
        allow_loopback: Also allow this machine.

    Returns:
        The status of the response.

    Raises:
        AddressRefusedError: The URL or an address of its host is not allowed.
        OutgoingError: The receiver cannot be reached, or does not respond in time.
    """
    check_url(url, allow_loopback)
    deadline = time.monotonic() + _TOTAL_SECONDS
    timeouts = dict.fromkeys(("connect", "read", "write", "pool"), _TOTAL_SECONDS)
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    try:
        with (
            httpcore.ConnectionPool(network_backend=_CheckedBackend(allow_loopback, deadline)) as pool,
            pool.stream("POST", url, headers=pairs, content=body, extensions={"timeout": timeouts}) as response,
        ):
            return response.status
    except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError, OSError) as error:
        reason = "TLS error" if isinstance(error.__cause__ or error.__context__, ssl.SSLError) else type(error).__name__
        raise OutgoingError(reason) from error


class _CheckedBackend(httpcore.NetworkBackend):
    """Connects only to checked addresses. Connecting, reading and writing end at a deadline."""

    def __init__(self, allow_loopback: bool, deadline: float) -> None:
        self._allow_loopback = allow_loopback
        self._deadline = deadline

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        try:
            resolved = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError("the host name cannot be resolved") from error
        addresses = [str(info[4][0]).partition("%")[0] for info in resolved]
        for address in addresses:
            require_allowed(ip_address(address), self._allow_loopback)

        seconds = _remaining(self._deadline, timeout)
        backend = httpcore.SyncBackend()
        stream = backend.connect_tcp(addresses[0], port, seconds, local_address, socket_options)
        peer = str(stream.get_extra_info("server_addr")[0]).partition("%")[0]
        try:
            require_allowed(ip_address(peer), self._allow_loopback)
        except AddressRefusedError:
            stream.close()
            raise
        return _TimedStream(stream, self._deadline)


class _TimedStream(httpcore.NetworkStream):
    """A stream whose time limits end at a deadline, so that a slow trickle of bytes does not prolong them."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _remaining(self._deadline, timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _remaining(self._deadline, timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        seconds = _remaining(self._deadline, timeout)
        return _TimedStream(self._stream.start_tls(ssl_context, server_hostname, seconds), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _remaining(deadline: float, timeout: float | None) -> float:
    """The time left for an operation. Raises httpcore.ReadTimeout after the deadline."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise httpcore.ReadTimeout("the time for the whole request is over")
    return seconds if timeout is None else min(seconds, timeout)
