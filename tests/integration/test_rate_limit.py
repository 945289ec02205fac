"""One rate limit for all API processes in a real Redis, and the fallback without Redis."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr

from api import rate_limit
from api.main import create_app
from api.rate_limit import RateLimit, window_of
from service.settings import Settings
from tests.servers import RedisServer, redis_server
from tests.service import settings_for


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as server:
        yield server


def settings(folder: Path, broker_url: SecretStr, per_second: float) -> Settings:
    return settings_for(folder, folder / "tiny", broker_url=broker_url, requests_per_second=per_second)


def url(redis: RedisServer) -> SecretStr:
    return SecretStr(redis.url)


def with_limits(count: int, config: Settings, work: Callable[[list[RateLimit]], Awaitable[None]]) -> None:
    """Run `work` with `count` rate limits, one per simulated process."""

    async def run() -> None:
        limits = [RateLimit(config) for _ in range(count)]
        try:
            async with asyncio.timeout(60):
                await work(limits)
        finally:
            for limit in limits:
                await limit.close()

    asyncio.run(run())


def test_processes_share_a_callers_rate(tmp_path: Path, redis: RedisServer) -> None:
    async def work(limits: list[RateLimit]) -> None:
        first, second = limits
        assert [await limit.take("a") for limit in (first, second)] == [0, 0]
        waits = [await limit.take("a") for limit in (first, second)]
        assert all(0 < wait <= 2 for wait in waits)
        assert await second.take("b") == 0
        await asyncio.sleep(max(waits) + 0.01)
        assert await second.take("a") == 0

    with_limits(2, settings(tmp_path, url(redis), 1), work)


def test_applications_share_a_callers_rate(tmp_path: Path, redis: RedisServer) -> None:
    statuses = []
    for name in ("first", "second"):
        with TestClient(create_app(settings(tmp_path / name, url(redis), 0.001))) as client:
            response = client.get("/jobs")
            statuses.append(response.status_code)
    assert statuses == [200, 429]
    assert 900 < int(response.headers["retry-after"]) <= 1000


def test_without_redis_each_process_counts_and_then_they_share_again(
    tmp_path: Path, redis: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rate_limit, "_PAUSE_SECONDS", 1.0)

    async def work(limits: list[RateLimit]) -> None:
        first, second = limits
        assert await first.take("a") == 0
        redis.kill()
        with caplog.at_level(logging.WARNING, logger="api.rate_limit"):
            assert [await first.take("a") > 0 for _ in range(5)] == [False, True, True, True, True]
            assert [await second.take("a") > 0 for _ in range(5)] == [False, True, True, True, True]
        assert [record.name for record in caplog.records] == ["api.rate_limit"] * 2  # once per process
        assert redis.url not in caplog.text

        redis.start()
        await asyncio.sleep(1)
        assert [await limit.take("a") > 0 for limit in (first, second)] == [False, True]

    with_limits(2, settings(tmp_path, url(redis), 0.001), work)


def connections_of(server: socket.socket) -> int:
    """Return the number of connections that wait to be accepted."""
    server.setblocking(False)
    count = 0
    while True:
        try:
            connection, _ = server.accept()
        except BlockingIOError:
            return count
        connection.close()
        count += 1


def test_each_waiting_request_queries_a_hanging_redis_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def work(limits: list[RateLimit]) -> None:
        together = await asyncio.gather(*(limits[0].take("a") for _ in range(20)))
        after = [await limits[0].take("a") for _ in range(20)]
        assert (together.count(0), after.count(0)) == (1, 0)
        assert len(caplog.records) == 1

    with socket.create_server(("127.0.0.1", 0)) as silent, caplog.at_level(logging.WARNING, logger="api.rate_limit"):
        broker_url = SecretStr(f"redis://127.0.0.1:{silent.getsockname()[1]}/0")
        with_limits(1, settings(tmp_path, broker_url, 0.001), work)
        assert 0 < connections_of(silent) <= 20  # the later 20 requests did not connect


@pytest.mark.parametrize(
    ("per_second", "requests", "seconds"),
    [(50, 100, 2), (2.7, 5, 2), (1, 2, 2), (0.5, 1, 2), (0.3, 1, 4), (0.001, 1, 1000), (0.02, 1, 50)],
)
def test_a_rate_in_whole_requests_and_seconds(per_second: float, requests: int, seconds: int) -> None:
    window = window_of(per_second)
    assert (window.amount, window.get_expiry()) == (requests, seconds)
