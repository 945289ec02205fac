"""Keeps programs running, one thread for each, and ends them in order.

Each runs below a guard (`api.stack.guard`), which ends it also where this process is killed.
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
_LONGEST_PAUSE_SECONDS = 30.0
_HEALTHY_SECONDS = 60.0
_LOOK_SECONDS = 0.05


class Part:
    """One program, started again when it ends, until `ask_to_stop`."""

    def __init__(self, program: Program, log: PartLog, terminal: Terminal, lock_file: int) -> None:
        self.program, self.log = program, log
        self._terminal, self._lock_file = terminal, lock_file
        self._stopping, self._died = threading.Event(), threading.Event()
        self._guard: subprocess.Popen[bytes] | None = None
        self._exit_code: int | None = None
        self._thread = threading.Thread(target=self._keep, name=program.name, daemon=True)

    def start(self) -> None:
        """Run it from now on."""
        self._thread.start()

    def wait_until_ready(self, stop: threading.Event) -> None:
        """Return once it works, or `stop` is set. Raises ProgramError where it ends before, or nothing happens."""
        deadline = time.monotonic() + _START_SECONDS
        while not stop.is_set() and not self.program.is_ready():
            if self._died.is_set():
                raise ProgramError(f"{self.program.name} ended with exit code {self._exit_code}")
            if time.monotonic() > deadline:
                raise ProgramError(f"{self.program.name} was not ready within {_START_SECONDS:.0f} s")
            stop.wait(_LOOK_SECONDS)

    def ask_to_stop(self) -> None:
        """Tell it to end, and do not start it again."""
        self._stopping.set()
        self._tell(STOP)

    def kill(self) -> None:
        """Do not wait for it any longer."""
        self._stopping.set()
        self._tell(KILL)

    @property
    def is_over(self) -> bool:
        """Whether it has ended for good."""
        return not self._thread.is_alive()

    @property
    def exit_code(self) -> int | None:
        """How it ended the last time."""
        return self._exit_code

    def _keep(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                self._exit_code = self._run()
            except OSError as error:
                self._exit_code = None
                self._terminal.show(self.program.name, f"cannot be started: {error}")
            self._died.set()
            if self._stopping.is_set():
                return
            if time.monotonic() - started > _HEALTHY_SECONDS:
                pause = _FIRST_PAUSE_SECONDS
            self.log.show_last()
            message = f"ended with exit code {self._exit_code}; it is started again in {pause:.1f} s"
            self._terminal.show(self.program.name, message)
            self._stopping.wait(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)

    def _run(self) -> int:
        """Run it once, to its end; its exit code."""
        guard = subprocess.Popen(
            _guarded(self.program),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(self.program.environment),
            start_new_session=True,  # a Ctrl-C in the terminal is not for it
            pass_fds=(self._lock_file,),
        )
        with guard:
            self._guard = guard
            if self._stopping.is_set():
                self._tell(STOP)
            if guard.stdout is not None:
                self._read(guard.stdout)
            return guard.wait()

    def _read(self, output: IO[bytes]) -> None:
        for line in output:
            self.log.write(line.decode("utf-8", "replace").rstrip())

    def _tell(self, what: bytes) -> None:
        guard = self._guard
        if guard is not None and guard.stdin is not None:
            with suppress(OSError, ValueError):  # it has ended
                guard.stdin.write(what)
                guard.stdin.flush()


class Supervisor:
    """Parts that start one after the other and end in the opposite order."""

    def __init__(self, logs: Path, terminal: Terminal, lock_file: int) -> None:
        self._logs, self._terminal, self._lock_file = logs, terminal, lock_file
        self._levels: list[list[Part]] = []
        self.stop, self.hurry = threading.Event(), threading.Event()

    def start(self, *programs: Program, are_ours: bool = True) -> None:
        """Run these beside each other; returns once all work. Raises ProgramError."""
        parts = [self._part(program, are_ours) for program in programs]
        self._levels.append(parts)
        for part in parts:
            part.start()
        for part in parts:
            part.wait_until_ready(self.stop)

    def end(self) -> bool:
        """End all; whether each ended by itself, without an error. `hurry` kills what has not."""
        ended_well = True
        for parts in reversed(self._levels):
            begun = [part for part in parts if not part.is_over]
            for part in begun:
                part.ask_to_stop()
            while not all(part.is_over for part in begun):
                if self.hurry.is_set():
                    for part in begun:
                        part.kill()
                time.sleep(_LOOK_SECONDS)
            for part in begun:
                if part.exit_code not in (0, 128 + part.program.stop_signal):  # some take their signal for a failure
                    ended_well = False
                    self._terminal.show(part.program.name, f"ended with exit code {part.exit_code}")
                part.log.close()
        self._levels.clear()
        return ended_well

    def _part(self, program: Program, is_ours: bool) -> Part:
        log = PartLog(program.name, self._logs, self._terminal, is_ours)
        return Part(program, log, self._terminal, self._lock_file)


def _guarded(program: Program) -> Sequence[str]:
    options = ["--signal", str(int(program.stop_signal)), "--seconds", str(program.stop_seconds)]
    options += ["--folder", str(program.folder)]
    if program.user is not None:
        options += ["--user", str(program.user)]
    return [sys.executable, "-m", "api.stack.guard", *options, "--", *program.command]
