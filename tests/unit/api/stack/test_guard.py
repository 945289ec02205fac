"""A guard stops its program and the program's children on request and when its supervisor ends."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

TIMEOUT_SECONDS = 60
FAMILY = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
STUBBORN = "import signal, time; signal.signal(15, lambda *_: None); print(0, flush=True)\nwhile 1: time.sleep(9)"


def guarded(folder: Path, code: str, seconds: float = TIMEOUT_SECONDS) -> tuple[subprocess.Popen[str], int]:
    """Start a guard of a Python program. Returns it and the first number that the program prints."""
    options = ["--signal", str(int(signal.SIGTERM)), "--seconds", str(seconds), "--folder", str(folder)]
    command = [sys.executable, "-m", "api.stack.guard", *options, "--", sys.executable, "-c", code]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert guard.stdout is not None
    return guard, int(guard.stdout.readline())


@pytest.mark.parametrize("message", ["s", ""])
def test_program_and_grandchild_end_on_request_and_at_the_end_of_the_pipe(tmp_path: Path, message: str) -> None:
    guard, grandchild = guarded(tmp_path, FAMILY)
    assert psutil.pid_exists(grandchild)
    guard.communicate(message, timeout=TIMEOUT_SECONDS)  # which also closes the pipe
    assert guard.returncode == 128 + signal.SIGTERM
    assert not psutil.pid_exists(grandchild) or psutil.Process(grandchild).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(("message", "seconds"), [("s", 0.2), ("sk", TIMEOUT_SECONDS)])
def test_a_program_that_does_not_stop_is_killed(tmp_path: Path, message: str, seconds: float) -> None:
    guard, _ = guarded(tmp_path, STUBBORN, seconds)
    guard.communicate(message, timeout=TIMEOUT_SECONDS)
    assert guard.returncode == 128 + signal.SIGKILL


def test_guard_exits_with_the_program_s_exit_code(tmp_path: Path) -> None:
    guard, _ = guarded(tmp_path, "print(0); raise SystemExit(7)")
    assert guard.wait(TIMEOUT_SECONDS) == 7
    for pipe in (guard.stdin, guard.stdout):
        assert pipe is not None
        pipe.close()
