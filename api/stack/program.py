"""A program that is run beside others: what to start, how to see that it works, how to stop it."""

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
    """A program, to be started any number of times, one after the other."""

    name: str
    command: tuple[str, ...]
    is_ready: Callable[[], bool]
    """Whether it does its work now. Must not raise while it does not."""
    folder: Path
    """Its current directory."""
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ), repr=False)
    user: int | None = None
    """The user it runs as; None: the one who starts it."""
    stop_signal: int = SIGTERM
    stop_seconds: float = 30.0
    """How long it may take to stop; then it is killed."""


def launch(program: Program, output: IO[bytes] | int) -> subprocess.Popen[bytes]:
    """Start it as a child of this process."""
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
    """The arguments of Popen that make the user run a program. Only root may name another."""
    return {} if user is None else {"user": user, "group": user, "extra_groups": []}


def wait_until_ready(program: Program, process: subprocess.Popen[bytes], seconds: float) -> None:
    """Return once it works. Raises ProgramError where it ends or the time is over."""
    deadline = time.monotonic() + seconds
    while not program.is_ready():
        if process.poll() is not None:
            raise ProgramError(f"{program.name} ended with exit code {process.returncode}")
        if time.monotonic() > deadline:
            raise ProgramError(f"{program.name} did not answer within {seconds:.0f} s")
        time.sleep(0.02)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def answers(port: int) -> bool:
    """Whether somebody listens on the port of 127.0.0.1."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
