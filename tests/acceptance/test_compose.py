"""The services of docker-compose.yml, run as local processes with their commands and environments, without Docker.

Host names and container paths are replaced by local ones. Images, users and networks are not tested.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from api.stack.program import free_port
from api.stack.servers import RedisServer, S3Server, _postgres_programs
from tests import compose
from tests.compose import REQUIRED, SECRETS
from tests.deployment import PATIENCE_SECONDS, ROOT, until
from tests.following import ended
from tests.servers import PostgresServer, postgres_server
from tests.service import SCORERS, round_body


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[tuple[PostgresServer, RedisServer, S3Server]]:
    with ExitStack() as stack:
        postgres = stack.enter_context(postgres_server())
        postgres.execute("CREATE DATABASE dfusion")
        for part in ("redis", "s3"):
            (tmp_path / part).mkdir()
        redis = RedisServer(tmp_path / "redis", password=SECRETS["REDIS_PASSWORD"])
        s3 = S3Server(
            tmp_path / "s3", access_key=SECRETS["DFUSION_S3_ACCESS_KEY"], secret_key=SECRETS["DFUSION_S3_SECRET_KEY"]
        )
        for server in (redis, s3):
            stack.callback(server.stop)
            server.start()
        yield postgres, redis, s3


class Containers:
    """Runs the services of docker-compose.yml as local processes."""

    def __init__(self, folder: Path, variables: dict[str, str], places: dict[str, str]) -> None:
        self._services = compose.interpolated(variables)["services"]
        self._folder, self._variables, self._places = folder, variables, places
        self.processes: dict[str, psutil.Popen] = {}

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text("utf-8")

    def _here(self, name: str, text: str) -> str:
        for there, here in self._places.items():
            text = text.replace(there, here)
        return text.replace("/tmp/health", str(self._folder / f"{name}.health"))

    def environment(self, name: str) -> dict[str, str]:
        """Return the variables of a service: its environment overrides its env_file."""
        service = self._services[name]
        variables = {key: self._here(name, value) for key, value in service["environment"].items()}
        if "env_file" in service:
            assert service["env_file"] == [{"path": ".env", "required": False}]
            variables = self._variables | variables
        return {key: value for key, value in os.environ.items() if not key.startswith("DFUSION_")} | variables

    def _command(self, command: list[str]) -> list[str]:
        program = {
            "python": [sys.executable],
            "celery": [sys.executable, "-m", "celery"],
            "psql": [str(_postgres_programs() / "psql")],
        }
        return [*program[command[0]], *command[1:]]

    def start(self, name: str) -> psutil.Popen:
        """Start the command of a service."""
        command = [self._here(name, part) for part in self._command(self._services[name]["command"])]
        with (self._folder / f"{name}.log").open("wb") as log:
            self.processes[name] = psutil.Popen(
                command, env=self.environment(name), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
            )
        return self.processes[name]

    def is_healthy(self, name: str) -> bool:
        """Run the health check of a service."""
        assert self.processes[name].poll() is None, self.log(name)
        kind, *command = self._services[name]["healthcheck"]["test"]
        assert kind == "CMD"
        command = [self._here(name, part) for part in self._command(command)]
        return subprocess.run(command, env=self.environment(name), cwd=ROOT, stderr=subprocess.DEVNULL).returncode == 0

    def stop(self) -> dict[str, int | None]:
        """Send SIGTERM to all services. Returns their exit codes; None if one exceeded its grace period."""
        codes: dict[str, int | None] = {}
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        stopped_at = time.monotonic()
        for name, process in self.processes.items():
            grace = int(self._services[name]["stop_grace_period"].removesuffix("s"))
            try:
                codes[name] = process.wait(max(0.1, stopped_at + grace - time.monotonic()))
            except psutil.TimeoutExpired:
                codes[name] = None
        return codes


@contextmanager
def containers(
    folder: Path, pipeline: Path, servers: tuple[PostgresServer, RedisServer, S3Server]
) -> Iterator[Containers]:
    postgres, redis, s3 = servers
    port = free_port()
    variables = REQUIRED | {
        "DFUSION_S3_PUBLIC_ENDPOINT": f"http://{s3.endpoint}",
        "DFUSION_MODELS": json.dumps({"tiny": str(pipeline)}),
        "DFUSION_SCORERS": json.dumps(SCORERS),
        "DFUSION_TORCH_THREADS": "1",
        "DFUSION_WORKER_NICENESS": "0",
        "DFUSION_MIN_FREE_DISK_MB": "0",
        "OMP_NUM_THREADS": "1",
    }
    places = {
        "@postgres:5432": f"@127.0.0.1:{postgres.port}",
        "host=postgres port=5432": f"host=127.0.0.1 port={postgres.port}",
        "/roles.sql": str(ROOT / "docker" / "postgres-roles.sql"),
        "@redis:6379": f"@127.0.0.1:{redis.port}",
        "http://s3:9000": f"http://{s3.endpoint}",
        "127.0.0.1:8000": f"127.0.0.1:{port}",
        "/var/lib/dfusion": str(folder / "work"),
        "0.0.0.0": "127.0.0.1",
    }
    services = Containers(folder, variables, places)
    services._services["api"]["environment"]["DFUSION_PORT"] = str(port)
    try:
        yield services
    finally:
        for process in services.processes.values():
            for child in (*process.children(recursive=True), process) if process.is_running() else ():
                child.kill()
            process.wait()


def test_a_round_through_what_compose_runs(
    tmp_path: Path, pipeline: Path, servers: tuple[PostgresServer, RedisServer, S3Server]
) -> None:
    with containers(tmp_path, pipeline, servers) as running:
        for name in ("postgres-roles", "migrate"):
            assert running.start(name).wait(PATIENCE_SECONDS) == 0, running.log(name)
            del running.processes[name]
        for name in ("api", "sweeper", "worker"):
            running.start(name)
        for name in running.processes:
            until(lambda name=name: running.is_healthy(name) or time.sleep(0.5))
        port = running.environment("api")["DFUSION_PORT"]
        key = {"Authorization": f"Bearer {SECRETS['DFUSION_BOOTSTRAP_ADMIN_KEY']}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=70) as stranger:
            assert stranger.post("/rounds", json=round_body()).status_code == 401
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=70, headers=key) as client:
            response = client.post("/rounds", json=round_body())
            assert response.status_code == 202, response.text
            job = ended(client, response.json()["id"])
            assert (job["state"], job["error"], job["outputs"]["models"]) == ("succeeded", None, 1)
            sample: dict[str, Any] = client.get(job["links"]["samples"]).json()["data"][0]
            link = client.get(sample["image"])
        assert link.status_code == 307
        assert link.headers["location"].startswith(f"http://{servers[2].endpoint}/dfusion/")
        image = httpx.get(link.headers["location"])  # without a key: the presigned link suffices
        assert (image.status_code, image.content[:8]) == (200, b"\x89PNG\r\n\x1a\n")
        assert running.stop() == {"api": 0, "sweeper": 0, "worker": 0}
        written = "".join(running.log(name) for name in running.processes)
        assert [name for name, secret in SECRETS.items() if secret in written] == []
        assert not re.search("Traceback", written)
        owners = servers[0].execute("SELECT rolname, rolsuper FROM pg_roles WHERE rolname LIKE 'dfusion%'")
        assert dict(owners) == {"dfusion": False, "dfusion_owner": False}
