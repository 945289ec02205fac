"""The parts of the local stack: servers and programs with their settings and folders."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from pydantic import SecretStr

from api.stack.program import Program, is_listening
from api.stack.secrets import Secrets
from api.stack.servers import PostgresServer, RedisServer, S3Server, Server
from service.errors import ProgramError
from service.settings import Settings

_BUCKET = "dfusion"
_DATABASE = "dfusion"
_EXTRA_STOP_SECONDS = 15.0
"""Time to close connections, after a worker has returned its stage to the queue."""


@dataclass(frozen=True)
class Ports:
    """Ports on 127.0.0.1; 0 selects a free port at each start."""

    api: int = 8000
    postgres: int = 0
    redis: int = 0
    s3: int = 0


class Layout:
    """The servers of a stack and the programs that use them. Raises ProgramError if a port is in use."""

    def __init__(self, settings: Settings, folder: Path, ports: Ports, workers: int) -> None:
        self.folder = folder.absolute()
        for name in ("postgres", "redis", "s3", "logs", "run", "service"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        _require_free(ports)

        secrets = Secrets.of(self.folder)
        self.postgres = PostgresServer(self.folder / "postgres", ports.postgres, password=secrets.postgres_password)
        self.redis = RedisServer(self.folder / "redis", ports.redis, password=secrets.redis_password)
        self.s3 = S3Server(
            self.folder / "s3",
            ports.s3,
            access_key=secrets.s3_access_key,
            secret_key=secrets.s3_secret_key,
            objects=self.folder / "s3" / "objects",
        )

        self._workers = workers
        self._key = settings.bootstrap_admin_key
        self.settings = self._settings(settings, ports.api)

    @property
    def servers(self) -> Sequence[Server]:
        """The servers that the service needs."""
        return (self.postgres, self.redis, self.s3)

    @property
    def names(self) -> Sequence[str]:
        """The names of all parts."""
        return [*(server.name for server in self.servers), "sweeper", *self._worker_names, "api", "stack"]

    @property
    def logs(self) -> Path:
        """The folder of all parts' logs."""
        return self.folder / "logs"

    @property
    def url(self) -> str:
        """The base URL of the API."""
        return f"http://127.0.0.1:{self.settings.port}"

    def migrate(self) -> Program:
        """The program that migrates the database and ends."""
        return self._program("migrate", "service.db.migrate")

    def workers(self) -> Sequence[Program]:
        """The programs of the sweeper and the workers."""
        celery = ("celery", "-A", "worker.celery_app", "worker", "-P", "prefork", "-c", "1")
        quiet = ("--without-gossip", "--without-mingle", "--loglevel", self.settings.log_level)
        workers = [self._program(name, *celery, "-n", f"{name}@%h", *quiet) for name in self._worker_names]
        return [self._program("sweeper", "worker.sweeper"), *workers]

    def api(self) -> Program:
        """The program of the API."""
        environment = {"DFUSION_BOOTSTRAP_ADMIN_KEY": self._key.get_secret_value()}
        return Program(
            "api",
            (sys.executable, "-m", "api"),
            self._api_is_ready,
            Path.cwd(),
            self.settings.for_child() | environment,
            stop_seconds=self.settings.shutdown_seconds + _EXTRA_STOP_SECONDS,
        )

    @property
    def _worker_names(self) -> Sequence[str]:
        return [f"worker{number}" for number in range(1, self._workers + 1)]

    def _settings(self, settings: Settings, port: int) -> Settings:
        """Adapt the settings to this stack's servers. Workers share the cores unless a number of threads is set."""
        threads = settings.torch_threads or max(1, (os.cpu_count() or 1) // max(1, self._workers))
        overrides = {
            "data_dir": self.folder / "service",
            "database_url": self.postgres.url(_DATABASE),
            "broker_url": SecretStr(self.redis.url),
            "embedded_worker": False,
            "host": "127.0.0.1",
            "port": port,
            "log_format": "text",
            "torch_threads": threads,
        }

        s3 = self.s3.settings(_BUCKET)
        keys = {name: SecretStr(s3[name]) for name in ("s3_access_key", "s3_secret_key")}
        return settings.model_copy(update=overrides | s3 | keys)

    def ensure_database(self) -> None:
        """Create the service's database if it is missing. The PostgreSQL server must be running."""
        self.postgres.ensure_database(_DATABASE)

    def _program(self, name: str, module: str, *arguments: str) -> Program:
        """Describe a module of the service as a program. It is ready once its health file exists."""
        health = self.folder / "run" / f"{name}.health"
        health.unlink(missing_ok=True)
        environment = self.settings.for_child() | {"DFUSION_HEALTH_FILE": str(health)}
        return Program(
            name,
            (sys.executable, "-m", module, *arguments),
            health.exists,
            Path.cwd(),
            environment,
            stop_seconds=self.settings.worker_stop_seconds + _EXTRA_STOP_SECONDS,
        )

    def _api_is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", trust_env=False).is_success
        except httpx.TransportError:
            return False


def _require_free(ports: Ports) -> None:
    for name, port in vars(ports).items():
        if port and is_listening(port):
            raise ProgramError(f"port {port} is in use: choose another with --{name}-port, or 0 for any free port")
