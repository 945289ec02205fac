"""Keeps programs running, with one thread per program, and stops them in reverse order.

Each program runs below a guard process (`api.stack.guard`), which stops it even if this process is killed.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from api.stack.guard import KILL, STOP
from api.stack.program import Program
from api.stack.terminal import PartLog, Terminal
from service.errors import ProgramError

_START_SECONDS = 300.0
_FIRST_PAUSE_SECONDS = 0.5
_MAX_PAUSE_SECONDS = 30.0
_HEALTHY_SECONDS = 60.0
_POLL_SECONDS = 0.05


class Part:
    """One program, restarted when it ends, until `stop` or `kill`."""

    def __init__(self, program: Program, log: PartLog, terminal: Terminal, lock_file: int) -> None:
        self.program = program
        self.log = log
        self._terminal = terminal
        self._lock_file = lock_file
        self._stopping = threading.Event()
        self._died = threading.Event()
        self._guard: subprocess.Popen[bytes] | None = None
        self._exit_code: int | None = None
        self._thread = threading.Thread(target=self._supervise, name=program.name, daemon=True)

    def start(self) -> None:
        """Start the program and keep it running."""
        self._thread.start()

    def wait_until_ready(self, stop: threading.Event) -> None:
        """Wait until the program is ready or `stop` is set. Raises ProgramError if it ends or the time is up."""
        deadline = time.monotonic() + _START_SECONDS
        while not stop.is_set() and not self.program.is_ready():
            if self._died.is_set():
                raise ProgramError(f"{self.program.name} ended with exit code {self._exit_code}")
            if time.monotonic() > deadline:
                raise ProgramError(f"{self.program.name} was not ready within {_START_SECONDS:.0f} s")
            stop.wait(_POLL_SECONDS)

    def stop(self) -> None:
        """Request a graceful stop, without restart. Does not wait."""
        self._stopping.set()
        self._send(STOP)

    def kill(self) -> None:
        """Kill the program, without restart. Does not wait."""
        self._stopping.set()
        self._send(KILL)

    @property
    def has_ended(self) -> bool:
        """Whether the program has ended and will not restart."""
        return not self._thread.is_alive()

    @property
    def exit_code(self) -> int | None:
        """Exit code of the last process; None before the first end or if it could not start."""
        return self._exit_code

    def _supervise(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while not self._stopping.is_set():
            started_at = time.monotonic()
            try:
                self._exit_code = self._run()
            except OSError as error:
                self._exit_code = None
                self._terminal.show(self.program.name, f"cannot start: {error}")
            self._died.set()
            if self._stopping.is_set():
                return

            if time.monotonic() - started_at > _HEALTHY_SECONDS:
                pause = _FIRST_PAUSE_SECONDS
            self.log.show_recent()
            message = f"ended with exit code {self._exit_code}; restarting in {pause:.1f} s"
            self._terminal.show(self.program.name, message)
            self._stopping.wait(pause)
            pause = min(pause * 2, _MAX_PAUSE_SECONDS)

    def _run(self) -> int:
        """Run the program once until it ends. Returns its exit code."""
        guard = subprocess.Popen(
            _guarded(self.program),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(self.program.environment),
            start_new_session=True,  # Ctrl-C in the terminal must not reach the program
            pass_fds=(self._lock_file,),
        )

        with guard:
            self._guard = guard
            if self._stopping.is_set():
                self._send(STOP)
            if guard.stdout is not None:
                self._log_output(guard.stdout)
            return guard.wait()

    def _log_output(self, output: IO[bytes]) -> None:
        for line in output:
            self.log.write(line.decode("utf-8", "replace").rstrip())

    def _send(self, message: bytes) -> None:
        guard = self._guard
        if guard is not None and guard.stdin is not None:
            with suppress(OSError, ValueError):  # the guard has ended
                guard.stdin.write(message)
                guard.stdin.flush()


class Supervisor:
    """Starts parts in order and stops them in reverse order.

    Set `stop` to end the wait of the main thread, and `kill` to kill parts that have not ended.
    """

    def __init__(self, logs: Path, terminal: Terminal, lock_file: int) -> None:
        self._logs = logs
        self._terminal = terminal
        self._lock_file = lock_file
        self._levels: list[list[Part]] = []
        self.stop = threading.Event()
        self.kill = threading.Event()

    def start(self, *programs: Program, is_ours: bool = True) -> None:
        """Start programs in parallel and wait until all are ready.

        Args:
            programs: The programs of one level; `shut_down` stops levels in reverse order.
            is_ours: Whether the programs belong to the service; important lines of these are shown.

        Raises:
            ProgramError: A program ended or was not ready in time.
        """
        parts = [self._part(program, is_ours) for program in programs]
        self._levels.append(parts)
        for part in parts:
            part.start()
        for part in parts:
            part.wait_until_ready(self.stop)

    def shut_down(self) -> bool:
        """Stop all parts and wait for them. Returns whether all ended without errors."""
        succeeded = True
        for level in reversed(self._levels):
            running = [part for part in level if not part.has_ended]
            self._stop_parts(running)
            for part in running:
                if part.exit_code not in (0, 128 + part.program.stop_signal):  # some programs exit by their stop signal
                    succeeded = False
                    self._terminal.show(part.program.name, f"ended with exit code {part.exit_code}")
                part.log.close()

        self._levels.clear()
        return succeeded

    def _stop_parts(self, parts: Sequence[Part]) -> None:
        for part in parts:
            part.stop()
        while not all(part.has_ended for part in parts):
            if self.kill.is_set():
                for part in parts:
                    part.kill()
            time.sleep(_POLL_SECONDS)

    def _part(self, program: Program, is_ours: bool) -> Part:
        log = PartLog(program.name, self._logs, self._terminal, is_ours)
        return Part(program, log, self._terminal, self._lock_file)


def _guarded(program: Program) -> Sequence[str]:
    options = ["--signal", str(int(program.stop_signal)), "--seconds", str(program.stop_seconds)]
    options += ["--folder", str(program.folder)]
    if program.user is not None:
        options += ["--user", str(program.user)]
    return [sys.executable, "-m", "api.stack.guard", *options, "--", *program.command]
