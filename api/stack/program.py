"""A program of the stack: how to start it, how to check that it is ready, how to stop it."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGTERM
from typing import IO, Any

from service.errors import ProgramError


@dataclass(frozen=True)
class Program:
    """A program that can be started repeatedly, one process at a time."""

    name: str
    command: tuple[str, ...]
    is_ready: Callable[[], bool]
    """Returns whether the program is ready. Must not raise if it is not."""
    folder: Path
    """Working directory."""
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ), repr=False)
    user: int | None = None
    """User id to run as; None: the current user."""
    stop_signal: int = SIGTERM
    stop_seconds: float = 30.0
    """Time to stop; afterwards the program is killed."""


def launch(program: Program, output: IO[bytes] | int) -> subprocess.Popen[bytes]:
    """Start the program as a child process with its output in `output`."""
    return subprocess.Popen(
        program.command,
        cwd=program.folder,
        env=dict(program.environment),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        **as_user(program.user),
    )


def as_user(user: int | None) -> dict[str, Any]:
    """Return the arguments of Popen that run a program as this user. Only root may name another user."""
    return {} if user is None else {"user": user, "group": user, "extra_groups": []}


def wait_until_ready(program: Program, process: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait until the program is ready. Raises ProgramError if it ends or the time is up."""
    deadline = time.monotonic() + seconds
    while not program.is_ready():
        if process.poll() is not None:
            raise ProgramError(f"{program.name} ended with exit code {process.returncode}")
        if time.monotonic() > deadline:
            raise ProgramError(f"{program.name} was not ready within {seconds:.0f} s")
        time.sleep(0.02)


def free_port() -> int:
    """Return a port of 127.0.0.1 that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def is_listening(port: int) -> bool:
    """Whether a server listens on the port of 127.0.0.1."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
