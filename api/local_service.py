"""The embedded service as a subprocess for the length of a block, for programs that bring their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from api.client import ApiError, Client
from api.stack.guard import KILL, STOP
from api.stack.program import free_port
from service.errors import AlreadyRunningError
from service.file_lock import file_lock

_STOP_SECONDS = 30.0
_LOCK_SECONDS = 60.0
"""How long the service of a process that was killed may take to end."""


class LocalServiceError(Exception):
    """The service cannot be started; the message says why."""


@contextmanager
def local_service(data_dir: Path, log: Path) -> Iterator[Client]:
    """The embedded service on a free port of 127.0.0.1, and a client of it.

    It runs below a guard, which stops it when the block ends and also when this process is killed.

    Args:
        data_dir: Its data; jobs that an earlier service left there continue.
        log: The file that its output goes to.

    Raises:
        LocalServiceError: It ended or was not ready in time, or another process uses `data_dir`.
    """
    port = free_port()
    own = {
        "DATA_DIR": str(data_dir.absolute()),
        "DATABASE_URL": "",
        "BROKER_URL": "",
        "S3_ENDPOINT": "",
        "AUTH": "0",
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "EMBEDDED_WORKER": "1",
    }
    environment = os.environ | {f"DFUSION_{name}": value for name, value in own.items()}

    try:
        with file_lock(data_dir / "local-service.lock", _LOCK_SECONDS) as lock, log.open("ab") as output:
            process = subprocess.Popen(
                _command(),
                env=environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a Ctrl-C in the terminal is not for it
                pass_fds=(lock.fileno(),),  # held until the service has ended, too
            )
            with process, Client(f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
                try:
                    _wait_until_ready(client, process, log)
                    yield client
                finally:
                    _stop(process)
    except AlreadyRunningError as error:
        raise LocalServiceError(f"the service of another process uses {data_dir}") from error


def _command() -> list[str]:
    options = ["--signal", str(int(signal.SIGTERM)), "--seconds", str(_STOP_SECONDS), "--folder", "."]
    return [sys.executable, "-m", "api.stack.guard", *options, "--", sys.executable, "-m", "api"]


def _wait_until_ready(client: Client, process: subprocess.Popen[bytes], log: Path, seconds: float = 180) -> None:
    """Ask until the service is ready and its worker has reported itself. Raises LocalServiceError."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise LocalServiceError(f"the service ended with exit code {process.returncode}; its log is {log}")
        try:
            if client.ready().status == "ok" and client.workers().data:
                return
        except ApiError:
            pass
        time.sleep(0.2)
    raise LocalServiceError(f"the service and its worker were not ready within {seconds:.0f} seconds; its log is {log}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the service in order; kill it if that takes too long."""
    for message in (STOP, KILL):
        if process.stdin is not None and process.poll() is None:
            process.stdin.write(message)
            process.stdin.flush()
            try:
                process.wait(_STOP_SECONDS + 5)
            except subprocess.TimeoutExpired:
                continue
        return
