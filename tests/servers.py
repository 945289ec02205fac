"""Real servers for tests, as processes of their own on 127.0.0.1."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

START_SECONDS = 60


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
    server = S3Server(folder, port or _free_port(), _free_port())
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


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended"
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.02)
    raise AssertionError("the server did not start in time")
