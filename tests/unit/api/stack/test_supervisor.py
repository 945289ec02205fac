"""Parts are restarted when they die, and stop in reverse order."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.stack.program import Program
from api.stack.supervisor import Supervisor
from api.stack.terminal import Terminal
from service.errors import ProgramError

TIMEOUT_SECONDS = 60
WORKING = """
import pathlib, signal, sys, time
here = pathlib.Path({name!r})
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path("ended").open("a").write({name!r}), sys.exit(0)))
here.touch()
while here.exists():
    time.sleep(0.01)
sys.exit(3)
"""


def program(folder: Path, name: str, code: str = WORKING) -> Program:
    """A program that runs while its file exists, and dies when the file is removed."""
    command = (sys.executable, "-c", code.format(name=name))
    return Program(name, command, (folder / name).exists, folder)


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    with (tmp_path / "lock").open("w") as lock:
        supervisor = Supervisor(tmp_path, Terminal(6, verbose=False), lock.fileno())
        yield supervisor
        supervisor.kill.set()
        supervisor.shut_down()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_part_that_dies_is_restarted_and_reported(
    tmp_path: Path, supervisor: Supervisor, capsys: pytest.CaptureFixture[str]
) -> None:
    supervisor.start(program(tmp_path, "one"))
    (tmp_path / "one").unlink()
    wait_for(tmp_path / "one")
    assert supervisor.shut_down()
    assert "one    | ended with exit code 3; restarting in 0.5 s\n" in capsys.readouterr().out


def test_parts_stop_in_reverse_order(tmp_path: Path, supervisor: Supervisor) -> None:
    for name in ("a", "b", "c"):
        supervisor.start(program(tmp_path, name))
    assert supervisor.shut_down()
    assert (tmp_path / "ended").read_text() == "cba"


def test_start_fails_if_a_part_ends_before_it_is_ready(
    tmp_path: Path, supervisor: Supervisor, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = program(tmp_path, "broken", "print('no such thing'); raise SystemExit(2)")
    with pytest.raises(ProgramError, match="broken ended with exit code 2"):
        supervisor.start(broken)
    assert "broken | no such thing\n" in capsys.readouterr().out
