"""The API as several processes on PostgreSQL and Redis.

A test selects the process that answers by stopping the other one: they accept connections from one socket.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

import service.pulse
from api.processes import _Process
from api.shared_text import SharedText
from tests.deployment import DEPLOYED, PATIENCE_SECONDS, Deployment, until
from tests.forking import call
from tests.servers import RedisServer, free_port, redis_server
from tests.service import round_body, settings_for


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def make_api(
    tmp_path_factory: pytest.TempPathFactory, redis: RedisServer, new_postgres_database: Callable[[], str]
) -> Callable[..., Deployment]:
    """Returns a function that makes an API of two processes, which is not started."""

    def make(**changes: Any) -> Deployment:
        folder = tmp_path_factory.mktemp("api")
        values = {"api_processes": 2, "port": free_port(), "metrics_open": True, "broker_url": redis.url}
        values |= {"database_url": new_postgres_database(), **changes}
        return Deployment(DEPLOYED, settings_for(folder / "data", folder / "tiny", **values), folder, forks=True)

    return make


def start(api: Deployment) -> None:
    """Start the API. Returns once both processes serve requests."""
    api.start_api()
    until(lambda: len(processes_of(api)) == 2)
    for process in processes_of(api):
        with alone(api, process):
            assert get(api, "/readyz").status_code == 200


@pytest.fixture(scope="module")
def api(make_api: Callable[..., Deployment]) -> Iterator[Deployment]:
    """A running API of two processes, which allows each address a request every 1000 seconds."""
    installation = make_api(requests_per_second=0.001)
    try:
        start(installation)
        yield installation
    finally:
        installation.stop()


def processes_of(api: Deployment) -> list[psutil.Process]:
    """The processes that serve requests; the forked parent has another child, which forks embedded workers."""
    children = psutil.Process(api.process["api"].pid).children()
    return [child for child in children if child.name() == "api"]


@contextmanager
def alone(api: Deployment, process: psutil.Process) -> Iterator[None]:
    """During the block, only this process runs."""
    others = [other for other in processes_of(api) if other.pid != process.pid]
    for other in others:
        other.suspend()
    try:
        yield
    finally:
        for other in others:
            other.resume()


def get(api: Deployment, path: str, address: str = "127.0.0.1") -> httpx.Response:
    """Send a request over a new connection from this address of the machine."""
    transport = httpx.HTTPTransport(verify=False, local_address=address)
    with httpx.Client(transport=transport, base_url=f"http://127.0.0.1:{api.settings.port}", timeout=70) as client:
        return client.get(path)


def samples(api: Deployment) -> list[tuple[str, tuple[tuple[str, str], ...], float]]:
    families = text_string_to_metric_families(get(api, "/metrics").text)
    return [(s.name, tuple(sorted(s.labels.items())), s.value) for family in families for s in family.samples]


def answered(api: Deployment) -> float:
    """The number of requests to /healthz of all processes."""
    labels = (("method", "GET"), ("route", "/healthz"), ("status", "200"))
    counts = [value for name, of, value in samples(api) if (name, of) == ("dfusion_http_requests_total", labels)]
    return sum(counts)


def test_each_process_shows_the_requests_of_all(api: Deployment) -> None:
    """The first process counts again after the other one: it must not overwrite what that one has counted."""
    before = answered(api)
    first, second = processes_of(api)
    for count, process in enumerate((first, second, first), start=1):
        with alone(api, process):
            assert get(api, "/healthz").status_code == 200
            assert answered(api) == before + count

    with alone(api, second):
        assert answered(api) == before + 3


def test_a_metric_appears_once(api: Deployment) -> None:
    get(api, "/healthz")
    series = [(name, labels) for name, labels, _ in samples(api)]
    assert len(set(series)) == len(series)
    assert ("dfusion_jobs", (("state", "queued"),)) in series
    assert ("dfusion_http_requests_total", (("method", "GET"), ("route", "/healthz"), ("status", "200"))) in series


def test_the_processes_share_a_callers_rate(api: Deployment) -> None:
    statuses = []
    for process in processes_of(api):
        with alone(api, process):
            statuses.append(get(api, "/jobs", "127.0.0.2").status_code)
    assert statuses == [200, 429]


def test_a_killed_process_is_replaced(api: Deployment) -> None:
    victim, other = processes_of(api)
    with alone(api, victim):
        get(api, "/healthz")
    until(lambda: answered(api) > 0)
    counts = [answered(api)]

    victim.kill()
    for _ in range(5):
        assert get(api, "/healthz").status_code == 200
        counts.append(answered(api))
    until(lambda: len(processes_of(api)) == 2 and victim.pid not in [process.pid for process in processes_of(api)])
    [replacement] = [process for process in processes_of(api) if process.pid != other.pid]
    with alone(api, replacement):
        assert get(api, "/healthz").status_code == 200
        until(lambda: answered(api) == counts[0] + 6)

    assert counts == sorted(counts)
    log = api.log("api").read_text("utf-8")
    assert f"(pid {victim.pid}) was killed by SIGKILL" in log
    assert api.settings.broker not in log
    assert len(list(Path(metrics_folder(api)).iterdir())) == 4  # counters and histograms, not of each process that ran


def metrics_folder(api: Deployment) -> str:
    """The folder of the counts, from the files that a process has open."""
    maps = processes_of(api)[0].memory_maps()
    return next(os.path.dirname(file.path) for file in maps if "/dfusion-metrics-" in file.path)


def test_sigterm_ends_all_processes_and_their_followers(make_api: Callable[..., Deployment]) -> None:
    api = make_api()
    try:
        start(api)
        processes, folder = processes_of(api), None
        with api.client() as client:
            job_id = client.post("/rounds", json=round_body()).json()["id"]
            folder = metrics_folder(api)
            followers = [Follower(api, job_id, process) for process in processes]
        api.process["api"].terminate()
        assert api.process["api"].wait(PATIENCE_SECONDS) == 0
        for follower in followers:
            follower.join(PATIENCE_SECONDS)
            assert (follower.is_alive(), follower.error) == (False, None)
        assert not any(process.is_running() for process in processes)
        assert "killing it" not in api.log("api").read_text("utf-8")
        assert not os.path.exists(folder)
    finally:
        api.stop()


class Follower(threading.Thread):
    """Follows the events of a job by a stream that this process of the API serves."""

    def __init__(self, api: Deployment, job_id: str, process: psutil.Process) -> None:
        super().__init__(daemon=True)
        self._api = api
        self._path = f"/jobs/{job_id}/events"
        self._connected = threading.Event()
        self.error: Exception | None = None
        with alone(api, process):
            self.start()
            assert self._connected.wait(PATIENCE_SECONDS)

    def run(self) -> None:
        try:
            with self._api.client() as client:
                with client.stream("GET", self._path, headers={"Accept": "text/event-stream"}) as response:
                    for _ in response.iter_lines():
                        self._connected.set()
        except httpx.HTTPError as error:
            self.error = error


def test_the_processes_end_with_their_parent(make_api: Callable[..., Deployment]) -> None:
    api = make_api()
    try:
        start(api)
        processes = processes_of(api)
        api.process["api"].kill()
        until(lambda: all(has_ended(process) for process in processes))
    finally:
        api.stop()


def has_ended(process: psutil.Process) -> bool:
    """Whether the process has ended. Without an init process it remains as a zombie."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_one_process_says_why_the_api_cannot_start(make_api: Callable[..., Deployment]) -> None:
    api = make_api(database_url="postgresql://dfusion:a-password@127.0.0.1:1/dfusion")
    api.run("api", "-m", "api")
    assert api.process["api"].wait(PATIENCE_SECONDS) == 3
    lines = [line for line in api.log("api").read_text("utf-8").splitlines() if "cannot start" in line]
    assert len(lines) == 1
    assert "DFUSION_DATABASE_URL: " in lines[0]
    assert "a-password" not in api.log("api").read_text("utf-8")


def test_a_process_that_hangs_is_killed() -> None:
    call(_watch_a_hanging_process)


def _watch_a_hanging_process() -> None:
    service.pulse._MIN_SILENCE_SECONDS = 0.0
    process = _Process(0, settings_for(Path("data"), Path("tiny"), lease_seconds=0.5))
    if process.fork():
        process.pulse.beat()
        time.sleep(PATIENCE_SECONDS)
    while (code := process.exit_code()) is None:
        process.check()
        time.sleep(0.05)
    assert (code, process.has_served) == (-signal.SIGKILL, True)


def test_a_text_is_computed_once_for_all_processes() -> None:
    call(_share_a_text)


def _share_a_text() -> None:
    shared = SharedText()
    if os.fork() == 0:
        os._exit(shared.get(lambda: (b"of the child", PATIENCE_SECONDS)) != b"of the child")
    assert os.wait()[1] == 0
    assert shared.get(lambda: (b"of the parent", PATIENCE_SECONDS)) == b"of the child"


def test_a_text_is_computed_again_when_it_is_too_old() -> None:
    shared = SharedText()
    assert shared.get(lambda: (b"a long one", 0)) == b"a long one"
    assert shared.get(lambda: (b"short", PATIENCE_SECONDS)) == b"short"
    assert shared.get(lambda: (b"not used", PATIENCE_SECONDS)) == b"short"


def test_an_error_leaves_no_text_and_no_lock() -> None:
    shared = SharedText()
    with pytest.raises(ZeroDivisionError):
        shared.get(lambda: (b"", 1 / 0))
    assert shared.get(lambda: (b"text", PATIENCE_SECONDS)) == b"text"
