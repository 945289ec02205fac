"""Runs one program, and ends it and its children on request or when its supervisor is gone.

`python -m api.stack.guard --signal 15 --seconds 30 [--user 65534] --folder PATH -- PROGRAM ARGUMENT …`

The supervisor holds the other end of this process's standard input. A byte `s`, or its end (the supervisor is gone,
however it went), stops the program; a byte `k` kills it. The exit code is the program's, or 128 and its signal.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from api.stack.program import as_user

STOP, KILL = b"s", b"k"
_STDIN = 0
_REAPED_SECONDS = 2.0


def main() -> int:
    """Run the program to its end; its exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--signal", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--user", type=int)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # only the pipe stops it; SIG_IGN would be inherited by the program
    process = subprocess.Popen(
        arguments.command,
        cwd=arguments.folder,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        **as_user(arguments.user),
    )
    try:
        _watch(process, arguments.signal, arguments.seconds)
    finally:
        _kill_group(process)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _watch(process: subprocess.Popen[bytes], stop_signal: int, stop_seconds: float) -> None:
    """Return when the program has ended, by itself or on request."""
    watched, deadline = [_STDIN, _end_of(process)], None
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = select.select(watched, (), (), left)[0]
        if watched[-1] in ready:
            return
        if _STDIN in ready:
            said = os.read(_STDIN, 1)
            if not said:
                watched.remove(_STDIN)
            if said == KILL:
                deadline = time.monotonic()
            elif deadline is None:
                process.send_signal(stop_signal)
                deadline = time.monotonic() + stop_seconds
        if deadline is not None and time.monotonic() >= deadline:
            _kill_group(process)
            process.wait()
            return


def _end_of(process: subprocess.Popen[bytes]) -> int:
    """A file descriptor that can be read from when the program has ended."""
    end, other = os.pipe()

    def wait() -> None:
        process.wait()
        os.close(other)

    threading.Thread(target=wait, daemon=True).start()
    return end


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the program and its children, and wait until it is gone.

    The wait is bounded: where nothing reaps orphans, they stay zombies.
    """
    deadline = time.monotonic() + _REAPED_SECONDS
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
        while time.monotonic() < deadline:
            time.sleep(0.01)
            os.killpg(process.pid, 0)


if __name__ == "__main__":
    sys.exit(main())
