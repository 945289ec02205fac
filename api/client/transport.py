"""Requests and their retries: what is sent again, after how long, and what becomes of answers that are errors."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from itertools import count
from typing import Any

import httpx

from api.client.errors import UnauthorizedError, UnreachableError, error_of
from service.errors import OutcomeUnknownError

PASSING = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})
"""Answers that say "not now"."""
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_CONNECT_SECONDS = 10.0
_FIRST_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 30.0

OnRetry = Callable[[str, float], None]


class Backoff:
    """Pauses that double, with jitter, so that clients of one service do not come back together."""

    def __init__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        self._random, self._sleep = random.Random(), sleep

    def seconds(self, attempt: int, asked: str | None = None) -> float:
        """Before the try after `attempt`, 0 for the first; `asked` is the answer's Retry-After."""
        if asked is not None and asked.strip().isdecimal():
            return min(float(asked), _LONGEST_PAUSE_SECONDS)
        longest: float = min(_FIRST_PAUSE_SECONDS * 2 ** min(attempt, 20), _LONGEST_PAUSE_SECONDS)
        return longest * self._random.uniform(0.5, 1)

    def pause(self, seconds: float) -> None:
        self._sleep(seconds)


class Transport:
    """HTTP to one service. `on_retry` hears why and after how many seconds a request is sent again."""

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
        self.base_url, self._retries, self._timeout = base_url.rstrip("/"), retries, timeout
        self._on_retry, self.backoff = on_retry, backoff or Backoff()
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
        repeatable: bool = True,
        wait_seconds: float = 0.0,
        also: frozenset[int] = frozenset(),
    ) -> httpx.Response:
        """The answer, if it is a success or a redirect, or its status is in `also`. Raises ApiError for others.

        `repeatable`: whether the request may be sent again when its answer was lost. `wait_seconds` is how long the
        service was asked to wait before it answers.
        """
        request = self._http.build_request(
            method,
            path,
            params={name: value for name, value in (params or {}).items() if value is not None},
            json=json,
            content=content,
            headers=dict(headers or {}),
            timeout=self._patience(self._timeout + wait_seconds),
        )

        for attempt in count():
            try:
                answer = self._http.send(request)
            except httpx.TransportError as error:
                lost = not (repeatable or isinstance(error, _NOT_SENT))
                if lost or attempt >= self._retries:
                    raise self.unreachable(error) from error
                self.again(f"no answer from {self.base_url} ({_why(error)})", attempt)
            else:
                if answer.status_code in also or answer.status_code < HTTPStatus.BAD_REQUEST:
                    return answer
                problem = error_of(answer)
                unknown = problem.code == OutcomeUnknownError.code and not repeatable
                if unknown or attempt >= self._retries or answer.status_code not in PASSING:
                    raise problem
                self.again(problem.detail, attempt, answer.headers.get("retry-after"))
        raise AssertionError("count() does not end")

    @contextmanager
    def stream(
        self, path: str, headers: Mapping[str, str], read_seconds: float, *, follow_redirects: bool = False
    ) -> Iterator[httpx.Response]:
        """An answer whose body is still to be read; no retries. Raises ApiError, and httpx.TransportError while the
        body is read."""
        with self._http.stream(
            "GET",
            path,
            headers=dict(headers),
            timeout=self._patience(read_seconds),
            follow_redirects=follow_redirects,
        ) as answer:
            if not answer.is_success:
                answer.read()
                raise error_of(answer)
            yield answer

    def again(self, why: str, attempt: int, asked: str | None = None) -> None:
        """Pause before the next try."""
        seconds = self.backoff.seconds(attempt, asked)
        if self._on_retry is not None:
            self._on_retry(why, seconds)
        self.backoff.pause(seconds)

    def unreachable(self, error: Exception) -> UnreachableError:
        return UnreachableError(f"no answer from {self.base_url}: {_why(error)}")

    def _patience(self, read_seconds: float) -> httpx.Timeout:
        return httpx.Timeout(read_seconds, connect=min(self._timeout, _CONNECT_SECONDS))


def _why(error: Exception) -> str:
    return str(error) or type(error).__name__
