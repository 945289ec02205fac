"""Runs one program; stops it and its children on request or when the supervisor ends.

`python -m api.stack.guard --signal 15 --seconds 30 [--user 65534] --folder PATH -- PROGRAM ARGUMENT …`

Standard input is a pipe from the supervisor. A byte `s` stops the program, and so does the end of the pipe, which
closes when the supervisor ends, even by SIGKILL. A byte `k` kills it. The exit code is the program's, or 128 plus its
signal.
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

STOP = b"s"
KILL = b"k"
_STDIN = 0
_REAP_SECONDS = 2.0


def main() -> int:
    """Run the program until it ends. Returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--signal", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--user", type=int)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # only the pipe stops the guard; the program would inherit SIG_IGN

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
    """Return when the program has ended, on its own or on request."""
    watched = [_STDIN, _exit_notifier(process)]
    deadline: float | None = None
    while True:
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = select.select(watched, (), (), timeout)[0]
        if watched[-1] in ready:
            return

        if _STDIN in ready:
            message = os.read(_STDIN, 1)
            if not message:
                watched.remove(_STDIN)
            if message == KILL:
                deadline = time.monotonic()
            elif deadline is None:
                process.send_signal(stop_signal)
                deadline = time.monotonic() + stop_seconds

        if deadline is not None and time.monotonic() >= deadline:
            _kill_group(process)
            process.wait()
            return


def _exit_notifier(process: subprocess.Popen[bytes]) -> int:
    """Return a file descriptor that becomes readable when the program has ended."""
    read_end, write_end = os.pipe()

    def wait() -> None:
        process.wait()
        os.close(write_end)

    threading.Thread(target=wait, daemon=True).start()
    return read_end


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the program's process group and wait until it has ended.

    The wait is bounded, because orphans remain zombies on systems that do not reap them.
    """
    deadline = time.monotonic() + _REAP_SECONDS
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
        while time.monotonic() < deadline:
            time.sleep(0.01)
            os.killpg(process.pid, 0)


if __name__ == "__main__":
    sys.exit(main())
