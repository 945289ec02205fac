"""Runs the embedded service as a subprocess for the duration of a `with` block."""

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
"""Longest time to wait until the service of a killed process has ended."""


class LocalServiceError(Exception):
    """The local service cannot be started."""


@contextmanager
def local_service(data_dir: Path, log: Path) -> Iterator[Client]:
    """Run the embedded service on a free port of 127.0.0.1 and yield a client of it.

    A guard process stops the service when the block ends, and also when this process is killed.

    Args:
        data_dir: Folder of the service's data; unfinished jobs of an earlier service continue.
        log: File for the service's output.

    Yields:
        A client of the service.

    Raises:
        LocalServiceError: The service ended, was not ready in time, or another process uses `data_dir`.
    """
    port = free_port()
    settings = {
        "DATA_DIR": str(data_dir.absolute()),
        "DATABASE_URL": "",
        "BROKER_URL": "",
        "S3_ENDPOINT": "",
        "AUTH": "0",
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "EMBEDDED_WORKER": "1",
    }
    environment = os.environ | {f"DFUSION_{name}": value for name, value in settings.items()}

    try:
        with file_lock(data_dir / "local-service.lock", _LOCK_SECONDS) as lock, log.open("ab") as output:
            process = subprocess.Popen(
                _command(),
                env=environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C in the terminal must not reach the service
                pass_fds=(lock.fileno(),),  # holds the lock until the service has ended
            )
            with process, Client(f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
                try:
                    _wait_until_ready(client, process, log)
                    yield client
                finally:
                    _stop(process)
    except AlreadyRunningError as error:
        raise LocalServiceError(f"a service of another process uses {data_dir}") from error


def _command() -> list[str]:
    options = ["--signal", str(int(signal.SIGTERM)), "--seconds", str(_STOP_SECONDS), "--folder", "."]
    return [sys.executable, "-m", "api.stack.guard", *options, "--", sys.executable, "-m", "api"]


def _wait_until_ready(client: Client, process: subprocess.Popen[bytes], log: Path, seconds: float = 180) -> None:
    """Poll until the service is ready and its worker has reported. Raises LocalServiceError."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            reason = _reason(log)
            raise LocalServiceError(f"the service ended with exit code {process.returncode}: {reason}; see {log}")
        try:
            if client.ready().status == "ok" and client.workers().data:
                return
        except ApiError:
            pass
        time.sleep(0.2)
    raise LocalServiceError(f"the service and its worker were not ready within {seconds:.0f} s; see its log, {log}")


def _reason(log: Path) -> str:
    """Why a service could not start, from its log."""
    lines = log.read_text("utf-8", "replace").strip().splitlines()
    reasons = [line for line in lines if "cannot start: " in line]
    return (reasons or lines or ["no output"])[-1]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the service gracefully; kill it if that takes too long."""
    for message in (STOP, KILL):
        if process.stdin is not None and process.poll() is None:
            process.stdin.write(message)
            process.stdin.flush()
            try:
                process.wait(_STOP_SECONDS + 5)
            except subprocess.TimeoutExpired:
                continue
        return
