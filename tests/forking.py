"""Starts Python programs as forks of a process that has already imported their modules.

A worker imports torch for seconds. A test that kills it again and again forks it instead: the program is the same, and
starts in a tenth of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.forking_preload"])


class Forked:
    """A forked program, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        self._process = _CONTEXT.Process(target=target, args=arguments, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Return the exit code; None while the program runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the program has ended. Returns its exit code. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal, if the program runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def fork(arguments: Sequence[str], folder: Path, environment: Mapping[str, str], log: Path) -> Forked:
    """Run `python -m MODULE ARGUMENT…` in a fork.

    Args:
        arguments: "-m", the module and its arguments.
        folder: The working directory.
        environment: All environment variables.
        log: The file that gets the output.
    """
    return Forked(_run_program, tuple(arguments), str(folder), dict(environment), str(log))


def call(function: Callable[..., None], *arguments: Any) -> None:
    """Call an importable function in a fork and wait for it. Raises RuntimeError if it fails."""
    code = Forked(function, *arguments).wait()
    if code != 0:
        raise RuntimeError(f"{function.__qualname__} ended with exit code {code}")


def _run_program(arguments: Sequence[str], folder: str, environment: Mapping[str, str], log: str) -> None:
    flag, module, *rest = arguments
    assert flag == "-m", arguments
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    os.close(output)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
