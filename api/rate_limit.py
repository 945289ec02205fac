"""Rate limits per caller, shared by all API processes."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

from limits import RateLimitItem, RateLimitItemPerSecond
from limits.aio.storage import RedisStorage
from limits.aio.strategies import MovingWindowRateLimiter
from redis import RedisError
from redis.asyncio import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from api.token_buckets import TokenBuckets
from service.settings import Settings

_REDIS_SECONDS = 0.25
"""A slower Redis counts as unavailable."""
_PAUSE_SECONDS = 5.0
"""After a failure, this process counts in memory for this time before it uses Redis again."""
_BURST_SECONDS = 2
_logger = logging.getLogger(__name__)


class RateLimit:
    """Allows each caller two seconds' worth of requests (at least one) in any two seconds.

    With a broker, the counts are stored in its Redis and shared by all API processes. Without one, and while Redis is
    unavailable or slow, this process counts in memory, so each process allows the full rate. Requests never fail
    because of Redis.
    """

    def __init__(self, settings: Settings) -> None:
        self._buckets = TokenBuckets(settings.requests_per_second)
        self._window = window_of(settings.requests_per_second)
        self._pool = _pool(settings.broker) if settings.broker else None
        self._shared = _limiter(self._pool) if self._pool else None
        self._unavailable_until = 0.0

    async def take(self, caller: str) -> float:
        """Take one request.

        Returns:
            0 if the request is allowed, otherwise the seconds to wait.
        """
        if self._shared is None or time.monotonic() < self._unavailable_until:
            return self._buckets.take(caller)

        try:
            if await self._shared.hit(self._window, caller):
                return 0.0
            window = await self._shared.get_window_stats(self._window, caller)
        except RedisError as error:
            self._pause(error)
            return self._buckets.take(caller)
        return max(window.reset_time - time.time(), 0.001)

    def _pause(self, error: RedisError) -> None:
        """Count in memory for a while. Only the first of several simultaneous failures logs a warning."""
        now = time.monotonic()
        if now >= self._unavailable_until:
            _logger.warning("Redis is unavailable (%s): requests are limited per process", type(error).__name__)
        self._unavailable_until = now + _PAUSE_SECONDS

    async def close(self) -> None:
        """Close the connections to Redis."""
        if self._pool is not None:
            await self._pool.aclose()


def window_of(per_second: float) -> RateLimitItem:
    """The rate in whole requests and seconds, rounded down: 2.7 per second is 5 in 2 seconds, 0.001 is 1 in 1000."""
    seconds = max(_BURST_SECONDS, math.ceil(1 / per_second))
    return RateLimitItemPerSecond(max(1, math.floor(seconds * per_second)), seconds, namespace="requests")


def _pool(url: str) -> ConnectionPool:
    """Connects with the first request. One attempt per command, since the caller waits for it."""
    return ConnectionPool.from_url(
        url, socket_connect_timeout=_REDIS_SECONDS, socket_timeout=_REDIS_SECONDS, retry=Retry(NoBackoff(), 0)
    )


def _limiter(pool: ConnectionPool) -> MovingWindowRateLimiter:
    options: dict[str, Any] = {"connection_pool": pool}  # limits declares options as text or numbers
    storage = RedisStorage("async+redis://", implementation="redispy", key_prefix="dfusion", **options)
    return MovingWindowRateLimiter(storage)
