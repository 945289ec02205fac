"""The service under load: `python -m benchmarks.service_load [--seconds 300]`.

Runs in deployed mode: PostgreSQL, Redis, S3 and two Celery workers on this machine. Each part is compared with a
smaller load:

1. 200 clients send one request per second for five minutes; no request may fail. Compared with ten clients.
2. 500 clients follow the events of one job, which is then cancelled; all must receive its end. Compared with ten.
3. The memory of the API after 10,000 requests, compared with its memory after the first tenth.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random
from typing import Any
from uuid import uuid4

import httpx
import psutil

from service.settings import Settings
from tests.deployment import ADMIN_KEY, DEPLOYED, HASTE, Deployment, deployment
from tests.nets import tiny_pipeline
from tests.service import PROMPTS, round_body

_CLIENTS = 200
_FOLLOWERS = 500
_FEW = 10
_SECONDS = 300.0
_REQUESTS = 10_000
_AT_ONCE = 8
_POSTS_OF_TEN = 1
_TIMEOUT_SECONDS = 60.0
_GROWTH_PERCENT = 10
_MEGABYTE = 1_000_000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=_CLIENTS, help="clients that send requests")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="how long they do so")
    parser.add_argument("--followers", type=int, default=_FOLLOWERS, help="clients that follow a job")
    parser.add_argument("--requests", type=int, default=_REQUESTS, help="requests after which memory is measured")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that its servers and workers end, too
    measure(arguments.clients, arguments.seconds, arguments.followers, arguments.requests)


def measure(
    clients: int = _CLIENTS, seconds: float = _SECONDS, followers: int = _FOLLOWERS, requests: int = _REQUESTS
) -> None:
    """Print all measurements of a temporary installation with the default limits, apart from those of queued jobs."""
    changes: dict[str, Any] = {"max_queued_jobs": 100_000, "max_queued_jobs_per_key": 100_000}
    changes |= {setting: Settings.model_fields[setting].default for setting in HASTE}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_pipeline().save_pretrained(folder / "pipeline")
        with deployment(DEPLOYED, folder, folder / "pipeline", **changes) as deployed:
            for number, duration in ((_FEW, min(seconds, 30)), (clients, seconds)):
                asyncio.run(_measure_clients(deployed, number, duration))
            for number in (_FEW, followers):
                asyncio.run(_measure_followers(deployed, number))
            asyncio.run(_measure_memory(deployed, requests))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@asynccontextmanager
async def _client(deployed: Deployment, connections: int) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    base = f"http://127.0.0.1:{deployed.settings.port}"
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    async with httpx.AsyncClient(
        base_url=base, timeout=_TIMEOUT_SECONDS, headers=headers, limits=limits, trust_env=False
    ) as client:
        yield client


@dataclass
class _Outcome:
    """The milliseconds of the successful requests, and the failures of the others."""

    milliseconds: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)


class _Requests:
    """Sends a request of a mixture: new jobs, lists and single resources."""

    def __init__(self, client: httpx.AsyncClient, seed: int) -> None:
        self._client = client
        self._random = Random(seed)
        self._seeds = count()
        self._job = ""
        self.outcome = _Outcome()

    async def send(self) -> None:
        """Send one request, and record its outcome."""
        call = self._post if not self._job or self._random.randrange(10) < _POSTS_OF_TEN else self._get
        started = time.perf_counter()
        try:
            response = await call()
        except httpx.HTTPError as error:
            self.outcome.failures[type(error).__name__] += 1
            return

        if response.is_success:
            self.outcome.milliseconds.append(1000 * (time.perf_counter() - started))
        else:
            self.outcome.failures[str(response.status_code)] += 1

    async def _post(self) -> httpx.Response:
        body = round_body(prompts=PROMPTS[:1], seed=next(self._seeds))
        response = await self._client.post("/rounds", json=body, headers={"Idempotency-Key": uuid4().hex})
        if response.is_success:
            self._job = response.json()["id"]
        return response

    async def _get(self) -> httpx.Response:
        job = f"/jobs/{self._job}"
        paths = (job, f"{job}/stages", f"{job}/events", f"{job}/metrics", "/jobs", f"/samples?job={self._job}")
        return await self._client.get(self._random.choice(paths))


# 1. many clients


async def _measure_clients(deployed: Deployment, clients: int, seconds: float) -> None:
    async with _client(deployed, clients) as http:
        senders = [_Requests(http, seed) for seed in range(clients)]
        end = time.monotonic() + seconds
        await asyncio.gather(*(_send_until(sender, n / clients, end) for n, sender in enumerate(senders)))

    milliseconds = [value for sender in senders for value in sender.outcome.milliseconds]
    failures = sum((sender.outcome.failures for sender in senders), Counter[str]())
    percentiles = statistics.quantiles(milliseconds, n=100)
    _say(
        f"{clients} clients for {seconds:.0f} s, each a request a second: {len(milliseconds):,} requests, "
        f"{failures.total()} failures{dict(failures) or ''} (target: 0); median {percentiles[49]:.0f} ms, "
        f"99% within {percentiles[98]:.0f} ms"
    )


async def _send_until(sender: _Requests, delay: float, end: float) -> None:
    """Send a request each second; the next one immediately if the last took longer."""
    due = time.monotonic() + delay
    while due < end:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        await sender.send()
        due = max(due + 1, time.monotonic())


# 2. many followers


async def _measure_followers(deployed: Deployment, followers: int) -> None:
    async with _client(deployed, followers + 1) as http:
        long = {"model": "tiny", "prompts": PROMPTS, "samples_per_prompt": 64, "sampling": {"num_steps": 200}}
        job_id = (await http.post("/samplings", json=long)).raise_for_status().json()["id"]
        following = [asyncio.Event() for _ in range(followers)]
        tasks = [asyncio.create_task(_follow(http, job_id, event)) for event in following]
        started = time.monotonic()
        await asyncio.wait_for(asyncio.gather(*(event.wait() for event in following)), _TIMEOUT_SECONDS)
        connected = time.monotonic() - started

        (await http.post(f"/jobs/{job_id}/cancel")).raise_for_status()
        started = time.monotonic()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        seconds = time.monotonic() - started

    seen = sum(end is True for end in ended)
    _say(
        f"{followers} followers of a job: {seen} saw its end (target: all), the last {seconds:.1f} s after the cancel; "
        f"all had the first event within {connected:.1f} s"
    )


async def _follow(http: httpx.AsyncClient, job_id: str, is_following: asyncio.Event) -> bool:
    """Read the events of the job. Returns whether the stream says that it has ended."""
    headers = {"Accept": "text/event-stream"}
    async with http.stream("GET", f"/jobs/{job_id}/events", headers=headers) as response:
        async for line in response.aiter_lines():
            is_following.set()
            if line == "event: end":
                return True
    return False


# 3. memory


async def _measure_memory(deployed: Deployment, requests: int) -> None:
    api = psutil.Process(deployed.process["api"].pid)
    async with _client(deployed, _AT_ONCE) as http:
        senders = [_Requests(http, seed) for seed in range(_AT_ONCE)]
        used = []
        for share in (0.1, 0.4, 0.5):
            number = round(requests * share / _AT_ONCE)
            await asyncio.gather(*(_send_many(sender, number) for sender in senders))
            used.append(_memory(api))

    first, half, last = used
    failures = sum((sender.outcome.failures for sender in senders), Counter[str]())
    _say(
        f"memory of the API: {first:.0f} MB after {requests // 10:,} requests, {half:.0f} MB after {requests // 2:,}, "
        f"{last:.0f} MB after {requests:,}: {100 * (last / first - 1):+.1f}% (target: below {_GROWTH_PERCENT}%); "
        f"{failures.total()} failures"
    )


async def _send_many(sender: _Requests, number: int) -> None:
    for _ in range(number):
        await sender.send()


def _memory(process: psutil.Process) -> float:
    """The resident memory of a process and its children, in megabytes."""
    processes = [process, *process.children(recursive=True)]
    return sum(float(each.memory_info().rss) for each in processes) / _MEGABYTE


if __name__ == "__main__":
    main()
