"""The service as separate processes with their own environment, in either mode.

embedded   `python -m api` on SQLite and files; it starts its worker
deployed   API, sweeper and two Celery workers on PostgreSQL, Redis and S3; API keys are required
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import psutil

from service.db.queries import stages
from service.db.tables import Stage
from service.service import Service
from service.settings import Settings
from tests.forking import Forked, fork
from tests.servers import PostgresServer, RedisServer, S3Server, free_port, postgres_server, redis_server, s3_server
from tests.service import HASTE as HASTE_IN_PROCESS
from tests.service import settings_for

EMBEDDED, DEPLOYED = "embedded", "deployed"
PATIENCE_SECONDS = 300
"""How long nothing may change: a machine that is busy with something else starts a worker in minutes."""
ROOT = Path(__file__).parents[1]
ADMIN_KEY = "dfk_" + "a1" * 20
DATABASE_PASSWORD = "database-password"
"""The server does not check it. It must not appear in logs nevertheless."""
FINAL = ("succeeded", "failed", "cancelled")
WORKERS = ("one@test", "two@test")
HASTE = HASTE_IN_PROCESS | {"lease_seconds": PATIENCE_SECONDS, "presence_seconds": 0.5, "rehint_seconds": 0.5}


def until(condition: Callable[[], Any]) -> Any:
    """Wait until `condition` returns a true value, and return it.

    What takes longer is asked for less often: a request costs as much time as a step of a job.
    """
    started = time.monotonic()
    while (waited := time.monotonic() - started) < PATIENCE_SECONDS:
        if value := condition():
            return value
        time.sleep(min(max(0.05, waited / 10), 0.3))
    raise AssertionError("it did not happen in time")


@dataclass
class Servers:
    """The servers of deployed mode."""

    postgres: PostgresServer
    redis: RedisServer
    s3: S3Server


@dataclass
class Deployment:
    """A running installation. `process` maps names to programs, and `log` returns the log file of each."""

    mode: str
    settings: Settings
    folder: Path
    servers: Servers | None = None
    process: dict[str, subprocess.Popen[bytes] | Forked] = field(default_factory=dict)
    forks: bool = True
    """Whether programs are forks of a process that has imported their modules."""
    workers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Environment variables of Celery workers by name. These workers are never forks."""
    has_workers: bool = True
    """Whether deployed mode has a sweeper and workers. In embedded mode, this is the setting `embedded_worker`."""
    accepted: set[str] = field(default_factory=set)
    """Jobs that the service has accepted (2xx)."""
    _service: Service | None = None

    @property
    def service(self) -> Service:
        """The installation's service, opened in the test process to inspect database and storage."""
        if self._service is None:
            self._service = Service.open(self.settings)
        return self._service

    @property
    def secrets(self) -> list[str]:
        """The secrets, which must not appear in any log or response."""
        return [ADMIN_KEY, DATABASE_PASSWORD, self.settings.s3_secret_key.get_secret_value() or ADMIN_KEY]

    def client(self, port: int | None = None) -> httpx.Client:
        """Create a client with all permissions."""
        headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
        base = f"http://127.0.0.1:{port or self.settings.port}"
        # verify=False: loading certificates would take longer than most requests
        return httpx.Client(base_url=base, timeout=70, headers=headers, trust_env=False, verify=False)

    def start(self) -> None:
        """Start all programs; returns once the service is ready."""
        self.start_api()
        if self.mode == DEPLOYED and self.has_workers:
            self.run("sweeper", "-m", "worker.sweeper")
            for name in WORKERS:
                self.start_worker(name)

    def start_api(self, name: str = "api", **changes: Any) -> None:
        """Start an API process and wait until it is ready."""
        settings = self.settings.model_copy(update=changes)
        self.run(name, "-m", "api", settings=settings, DFUSION_BOOTSTRAP_ADMIN_KEY=ADMIN_KEY if settings.auth else "")
        with self.client(settings.port) as client:
            until(lambda: self.is_ready(client, name) or time.sleep(0.1))

    def is_ready(self, client: httpx.Client, name: str = "api") -> bool:
        """Whether the service is ready. Fails the test if the API process has ended."""
        assert self.process[name].poll() is None, self.log(name).read_text("utf-8")
        try:
            return client.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def start_worker(self, name: str) -> None:
        """Start a Celery worker."""
        options = ("-P", "prefork", "-c", "1", "-n", name, "--without-mingle", "--without-gossip")
        program = ("-m", "celery", "-A", "worker.celery_app", "worker", *options, "--loglevel", "INFO")
        self.run(name, *program, **self.workers.get(name, {}))

    def run(self, name: str, *arguments: str, settings: Settings | None = None, **environment: str) -> None:
        """Start a Python program of the installation under this name."""
        variables = (settings or self.settings).for_child() | {"PYTHONPATH": str(ROOT)} | environment
        if self.forks and name not in self.workers:
            self.process[name] = fork(arguments, self.folder, variables, self.log(name))
            return
        with self.log(name).open("ab") as log:
            self.process[name] = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=self.folder,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def logs(self) -> str:
        """Return the log output of all programs."""
        return "\n".join(path.read_text("utf-8", "replace") for path in sorted(self.folder.glob("*.log")))

    def stop(self) -> None:
        """Stop all programs gracefully, as an operator does; kill those that do not end. No child process remains."""
        if self._service is not None:
            self._service.close()
        alive = [process for process in self.process.values() if process.poll() is None]
        families = [child for process in alive for child in psutil.Process(process.pid).children(recursive=True)]
        for process in alive:
            process.terminate()
        with ExitStack() as stack:
            for child in families:
                stack.callback(_end, child)
            for process in alive:
                stack.callback(process.kill)
                stack.callback(process.wait, PATIENCE_SECONDS)

    def post(self, path: str, body: dict[str, Any], **headers: str) -> str:
        """Submit a job. Returns its id."""
        with self.client() as client:
            response = client.post(path, json=body, headers=headers)
        assert response.status_code == 202, response.text
        return self.accept(response)

    def accept(self, response: httpx.Response) -> str:
        """Record a job that the service has accepted. Returns its id."""
        job_id = str(response.json()["id"])
        self.accepted.add(job_id)
        return job_id

    def accept_all(self) -> None:
        """Record all jobs of the database as accepted, including those of other clients."""
        self.accepted.update(job["id"] for job in self.all("/jobs"))

    def get(self, path: str) -> Any:
        with self.client() as client:
            response = client.get(path)
        assert response.status_code == 200, response.text
        return response.json()

    def all(self, path: str) -> list[dict[str, Any]]:
        return list(self.get(f"{path}{'&' if '?' in path else '?'}limit=200")["data"])

    def ended(self, job_id: str) -> dict[str, Any]:
        """Wait with long polls until the job has ended. Returns it."""
        before: object = None
        deadline = 0.0
        with self.client() as client:
            while True:
                job: dict[str, Any] = client.get(f"/jobs/{job_id}", params={"wait": 10}).json()
                if job["state"] in FINAL:
                    return job
                now = (job["state"], job["progress"] | {"eta_seconds": None}, job["attempts"], job["outputs"])
                if now != before:
                    before, deadline = now, time.monotonic() + PATIENCE_SECONDS
                assert time.monotonic() < deadline, f"the job makes no progress\n{self.logs()[-20_000:]}"

    def done(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Submit a job and wait until it has succeeded. Returns it."""
        job = self.ended(self.post(path, body))
        assert (job["state"], job["error"]) == ("succeeded", None), self.logs()[-20_000:]
        return job

    def stages(self, job_id: str) -> list[Stage]:
        """Return the job's stages from the database."""
        with self.service.uow.reading() as session:
            return stages.of_job(session, job_id)

    def running(self, job_id: str, *kinds: str) -> Stage | None:
        """Return a running stage of the job, of one of these kinds."""
        matching = (stage for stage in self.stages(job_id) if stage.state == "running" and stage.kind in kinds)
        return next(matching, None)

    def embedded_worker(self) -> psutil.Process | None:
        """Return the process of the embedded worker."""
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process["api"].pid).children():
                if "worker.local" in (child.name(), *child.cmdline()):
                    return child
        return None

    def worker_of(self, stage: Stage) -> psutil.Process | None:
        """Return the process that runs the stage; None if it has just ended."""
        if self.mode == EMBEDDED:
            return self.embedded_worker()
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.process[str(stage.lease_owner)].pid).children()
            return children[0] if children else None
        return None


def _end(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        os.kill(process.pid, signal.SIGKILL) if process.is_running() else None


@contextmanager
def deployment(
    mode: str,
    folder: Path,
    pipeline: Path,
    *,
    forks: bool = True,
    reroute: Callable[[Servers], dict[str, Any]] = lambda _servers: {},
    workers: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
    has_workers: bool = True,
    **changes: Any,
) -> Iterator[Deployment]:
    """Start an installation in this mode, ready for requests. Its programs end with the block.

    Args:
        mode: EMBEDDED or DEPLOYED.
        folder: An empty folder for data and logs.
        pipeline: The folder of the model `tiny`.
        forks: Fork the programs from a process that has imported their modules. Otherwise start them as users do.
        reroute: Returns settings that lead to the servers in another way, such as through proxies.
        workers: Environment variables of Celery workers by name. These workers are not forked.
        has_workers: Start a sweeper and workers in deployed mode.
        changes: Settings.
    """
    with ExitStack() as stack:
        settings = {"port": free_port(), **HASTE}
        servers = None
        if mode == EMBEDDED:
            settings |= {"embedded_worker": True}
        else:
            servers, server_settings = _servers(stack, folder)
            settings |= server_settings | reroute(servers)
        installation = Deployment(
            mode,
            settings_for(folder / "data", pipeline, **(settings | changes)),
            folder,
            servers,
            forks=forks,
            workers=workers,
            has_workers=has_workers,
        )
        stack.callback(installation.stop)
        installation.start()
        yield installation


def _servers(stack: ExitStack, folder: Path) -> tuple[Servers, dict[str, Any]]:
    """Start the servers of deployed mode. Returns them and the settings that name them."""
    (folder / "s3").mkdir()
    postgres = stack.enter_context(postgres_server())
    servers = Servers(
        postgres, stack.enter_context(redis_server(folder)), stack.enter_context(s3_server(folder / "s3"))
    )
    return servers, {
        "database_url": with_password(postgres.create_database()),
        "broker_url": servers.redis.url,
        "auth": True,
        **servers.s3.settings("deployed"),
    }


def with_password(url: str) -> str:
    """Return the URL of a database with the password that must not be seen."""
    return url.replace("postgres@", f"postgres:{DATABASE_PASSWORD}@")
