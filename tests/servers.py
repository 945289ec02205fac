"""Real servers for tests, as processes on 127.0.0.1, and a proxy that cuts connections to them."""

from __future__ import annotations

import os
import re
import secrets
import select
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from redis import Redis
from sqlalchemy import make_url

from api.stack import servers
from api.stack.program import Program, free_port, is_listening


class PostgresServer(servers.PostgresServer):
    """A PostgreSQL server without durability, with databases for tests."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, durable=False)

    def create_database(self, template: str = "template1") -> str:
        """Create a database as a copy of `template`, which must have no connections. Returns its URL."""
        name = f"test_{secrets.token_hex(8)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY")  # a fifth of the CPU time
        return self.url(name)

    def drop_database(self, url: str) -> None:
        """Delete a database. Ends connections to it."""
        self.execute(f"DROP DATABASE {make_url(url).database} WITH (FORCE)")

    def dump(self, url: str, file: Path) -> None:
        """Back up a database as docs/deploy.md does."""
        self._run_tool("pg_dump", "--format=custom", f"--file={file}", url)

    def restore(self, file: Path) -> str:
        """Restore a backup into a new database. Returns its URL."""
        url = self.create_database("template0")
        self._run_tool("pg_restore", "--exit-on-error", f"--dbname={url}", str(file))
        return url

    def run_file(self, database: str, file: Path, **variables: str) -> None:
        """Run a file of SQL by psql, with these environment variables. Fails with its messages."""
        self._run_tool("psql", "--quiet", "--file", str(file), self.url(database), **variables)

    def _run_tool(self, name: str, *arguments: str, **variables: str) -> None:
        command = [str(self._bin / name), *arguments]
        done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


class S3Server(servers.S3Server):
    """An S3 server with a folder that tests can change."""

    def __init__(self, folder: Path, port: int) -> None:
        super().__init__(folder, port, access_key="test-access-key", secret_key="test-secret-key")
        self.control_port = free_port()


class RedisServer(servers.RedisServer):
    """A Redis server that tests can flush and kill."""

    def flush(self) -> None:
        """Delete all keys."""
        with Redis.from_url(self.url) as client:
            client.flushall()

    def kill(self) -> None:
        """Kill the server, as in a crash."""
        self.stop()


class PgBouncer(servers.Server):
    """PgBouncer in transaction mode, which shares two sessions of a PostgreSQL server."""

    name = "pgbouncer"

    def __init__(self, folder: Path, postgres: PostgresServer) -> None:
        super().__init__(folder)
        self._server = make_url(postgres.url("postgres"))

    def url(self, url: str) -> str:
        """The URL at PgBouncer of a database of the server."""
        return make_url(url).set(host="127.0.0.1", port=self.port).render_as_string(hide_password=False)

    def program(self) -> Program:
        (self.folder / "users").write_text(f'"{self._server.username}" ""\n')
        (self.folder / "ini").write_text(
            f"[databases]\n* = host={self._server.host} port={self._server.port}\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {self.port}\nunix_socket_dir =\nauth_type = trust\n"
            f"auth_file = {self.folder}/users\npool_mode = transaction\ndefault_pool_size = 2\nserver_round_robin = 1\n"
        )
        as_user = ("-u", "nobody") if os.geteuid() == 0 else ()
        command = ("pgbouncer", "-q", *as_user, str(self.folder / "ini"))
        return Program(self.name, command, lambda: is_listening(self.port), self.folder)


_ENDS = re.compile(rb"(COMMIT|ROLLBACK)\0")
"""The messages of PostgreSQL's clients that end a transaction."""


class CuttingProxy:
    """A proxy between a client and a server on 127.0.0.1 that cuts one connection on request.

    `cut_at(part, delivered, answered, after)` arms it for the next message from a client that contains `part`, in a
    transaction in which the client has sent `after`. The message reaches the server if `delivered`, and the proxy waits
    for the reply if `answered`. The client gets no reply.
    """

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._armed: tuple[bytes, bool, bool, bytes] | None = None
        self.cuts = 0
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def cut_at(self, part: bytes, delivered: bool, answered: bool = True, after: bytes = b"") -> None:
        """Cut the connection at the next message that contains `part`."""
        self._armed = (part, delivered, delivered and answered, after)

    def close(self) -> None:
        """Stop accepting connections."""
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # the listener is closed
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self._server_port))
                except ConnectionError:  # the server is away
                    client.close()
                    continue
                threading.Thread(target=self._pass_on, args=(client, server), daemon=True).start()

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        transaction = b""
        with client, server, suppress(OSError):
            while True:
                for ready in select.select((client, server), (), ())[0]:
                    data = ready.recv(1 << 16)
                    if not data:
                        return
                    if ready is client:
                        transaction = transaction + data if not _ENDS.search(transaction) else data
                        if self._is_next(data, transaction):
                            self._cut(server, data)
                            return
                    (server if ready is client else client).sendall(data)

    def _is_next(self, data: bytes, transaction: bytes) -> bool:
        armed = self._armed
        return armed is not None and armed[0] in data and armed[3] in transaction

    def _cut(self, server: socket.socket, data: bytes) -> None:
        (_, delivered, answered, _), self._armed = self._armed or (b"", False, False, b""), None
        self.cuts += 1
        if delivered:
            server.sendall(data)
        if answered:
            server.recv(1 << 16)


@contextmanager
def cutting_proxy(port: int) -> Iterator[CuttingProxy]:
    """Run a proxy of the server at `port` during the block."""
    proxy = CuttingProxy(port)
    try:
        yield proxy
    finally:
        proxy.close()


@contextmanager
def postgres_server(folder: Path | None = None) -> Iterator[PostgresServer]:
    """Run a PostgreSQL server in an empty folder, which is removed afterwards.

    As root, the folder must be accessible to another user, which pytest's tmp_path is not: omit it.
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


@contextmanager
def s3_server(folder: Path, port: int | None = None) -> Iterator[S3Server]:
    """Run `rclone serve s3` on `folder` during the block."""
    server = S3Server(folder, port or free_port())
    try:
        server.start()
        yield server
    finally:
        server.stop()


@contextmanager
def redis_server(folder: Path) -> Iterator[RedisServer]:
    """Run a Redis server during the block."""
    server = RedisServer(folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()
