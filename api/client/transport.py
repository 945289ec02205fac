"""HTTP requests with retries and backoff; error responses are raised as ApiError."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from itertools import count
from typing import Any

import httpx

from api.client.errors import UnauthorizedError, UnreachableError, error_from
from service.errors import OutcomeUnknownError

_RETRY_STATUSES = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
"""Errors after which the service cannot have received the request."""
_CONNECT_SECONDS = 10.0
_FIRST_PAUSE_SECONDS = 0.25
_MAX_PAUSE_SECONDS = 30.0

OnRetry = Callable[[str, float], None]


class Backoff:
    """Exponential backoff with jitter, so that clients do not retry at the same time."""

    def __init__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        self._random = random.Random()
        self._sleep = sleep

    def seconds(self, attempt: int, retry_after: str | None = None) -> float:
        """Return the pause after a failed attempt.

        Args:
            attempt: The number of the failed attempt; the first is 0.
            retry_after: The header Retry-After of the response. It overrides the exponential pause.
        """
        if retry_after is not None and retry_after.strip().isdecimal():
            return min(float(retry_after), _MAX_PAUSE_SECONDS)

        longest: float = min(_FIRST_PAUSE_SECONDS * 2 ** min(attempt, 20), _MAX_PAUSE_SECONDS)
        return longest * self._random.uniform(0.5, 1)

    def pause(self, seconds: float) -> None:
        """Sleep."""
        self._sleep(seconds)


class Transport:
    """HTTP connections to one service. `on_retry` is called before each retry with the reason and the pause."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        timeout: float,
        *,
        retries: int,
        trust_env: bool,
        on_retry: OnRetry | None = None,
        backoff: Backoff | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._retries = retries
        self._timeout = timeout
        self._on_retry = on_retry
        self.backoff = backoff or Backoff()

        headers = {"Accept": "application/json"}
        if api_key:
            if not (api_key.isascii() and api_key.isprintable()):
                raise UnauthorizedError("expected an API key of ASCII characters", code="unauthorized")
            headers["Authorization"] = f"Bearer {api_key}"

        if not self.base_url.startswith(("http://", "https://")):
            raise UnreachableError(f"expected an address like http://127.0.0.1:8000, got {base_url!r}")
        try:
            self._http = httpx.Client(base_url=self.base_url, headers=headers, trust_env=trust_env)
        except (httpx.InvalidURL, ValueError) as error:
            raise UnreachableError(f"cannot use the address {base_url!r}: {error}") from error

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        json: Any = None,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        idempotent: bool = True,
        wait_seconds: float = 0.0,
        allowed_statuses: frozenset[int] = frozenset(),
    ) -> httpx.Response:
        """Send a request, with retries.

        Args:
            method: The HTTP method.
            path: The path, relative to the base URL.
            params: Query parameters; those that are None are omitted.
            json: A JSON body.
            content: A binary body.
            headers: Additional headers.
            idempotent: Whether to retry if the response was lost, although the service may have handled the request.
            wait_seconds: Additional time for the response, if the service was asked to wait.
            allowed_statuses: Error statuses to return instead of raising.

        Returns:
            A response with a status below 400 or in `allowed_statuses`.

        Raises:
            UnreachableError: No response.
            ApiError: An error response.
        """
        request = self._http.build_request(
            method,
            path,
            params={name: value for name, value in (params or {}).items() if value is not None},
            json=json,
            content=content,
            headers=dict(headers or {}),
            timeout=self._timeouts(self._timeout + wait_seconds),
        )

        for attempt in count():
            try:
                response = self._http.send(request)
            except httpx.TransportError as error:
                can_retry = idempotent or isinstance(error, _NOT_SENT)
                if not can_retry or attempt >= self._retries:
                    raise self.unreachable(error) from error
                self.pause_before_retry(f"no response from {self.base_url} ({_reason(error)})", attempt)
            else:
                if response.status_code in allowed_statuses or response.status_code < HTTPStatus.BAD_REQUEST:
                    return response
                problem = error_from(response)
                can_retry = idempotent or problem.code != OutcomeUnknownError.code
                if not can_retry or attempt >= self._retries or response.status_code not in _RETRY_STATUSES:
                    raise problem
                self.pause_before_retry(problem.detail, attempt, response.headers.get("retry-after"))
        raise AssertionError("count() does not end")

    @contextmanager
    def stream(
        self, path: str, headers: Mapping[str, str], read_seconds: float, *, follow_redirects: bool = False
    ) -> Iterator[httpx.Response]:
        """Send a GET request without retries, and stream the body of the response.

        Raises:
            ApiError: An error response.
            httpx.TransportError: The connection failed, possibly while the body was read.
        """
        with self._http.stream(
            "GET",
            path,
            headers=dict(headers),
            timeout=self._timeouts(read_seconds),
            follow_redirects=follow_redirects,
        ) as response:
            if not response.is_success:
                response.read()
                raise error_from(response)
            yield response

    def pause_before_retry(self, reason: str, attempt: int, retry_after: str | None = None) -> None:
        """Report a retry to `on_retry` and pause."""
        seconds = self.backoff.seconds(attempt, retry_after)
        if self._on_retry is not None:
            self._on_retry(reason, seconds)
        self.backoff.pause(seconds)

    def unreachable(self, error: Exception) -> UnreachableError:
        """Convert a transport error."""
        return UnreachableError(f"no response from {self.base_url}: {_reason(error)}")

    def _timeouts(self, read_seconds: float) -> httpx.Timeout:
        return httpx.Timeout(read_seconds, connect=min(self._timeout, _CONNECT_SECONDS))


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
