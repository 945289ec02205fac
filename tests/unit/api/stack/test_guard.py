"""A guard ends its program, and what that started, when it is told to and when its supervisor is gone."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

PATIENCE_SECONDS = 60
FAMILY = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
STUBBORN = "import signal, time; signal.signal(15, lambda *_: None); print(0, flush=True)\nwhile 1: time.sleep(9)"


def guarded(folder: Path, code: str, seconds: float = PATIENCE_SECONDS) -> tuple[subprocess.Popen[str], int]:
    """A guard of a Python program, and the first number that the program says."""
    options = ["--signal", str(int(signal.SIGTERM)), "--seconds", str(seconds), "--folder", str(folder)]
    command = [sys.executable, "-m", "api.stack.guard", *options, "--", sys.executable, "-c", code]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert guard.stdout is not None
    return guard, int(guard.stdout.readline())


@pytest.mark.parametrize("told", ["s", ""])
def test_program_and_grandchild_end_when_it_is_told_or_its_supervisor_is_gone(tmp_path: Path, told: str) -> None:
    guard, grandchild = guarded(tmp_path, FAMILY)
    assert psutil.pid_exists(grandchild)
    guard.communicate(told, timeout=PATIENCE_SECONDS)  # which also closes the pipe
    assert guard.returncode == 128 + signal.SIGTERM
    assert not psutil.pid_exists(grandchild) or psutil.Process(grandchild).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(("told", "seconds"), [("s", 0.2), ("sk", PATIENCE_SECONDS)])
def test_a_program_that_does_not_stop_is_killed(tmp_path: Path, told: str, seconds: float) -> None:
    guard, _ = guarded(tmp_path, STUBBORN, seconds)
    guard.communicate(told, timeout=PATIENCE_SECONDS)
    assert guard.returncode == 128 + signal.SIGKILL


def test_the_exit_code_is_the_programs(tmp_path: Path) -> None:
    guard, _ = guarded(tmp_path, "print(0); raise SystemExit(7)")
    assert guard.wait(PATIENCE_SECONDS) == 7
    for pipe in (guard.stdin, guard.stdout):
        assert pipe is not None
        pipe.close()
