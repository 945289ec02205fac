"""Forks of the fork server, also from a process of pytest-xdist, which is such a fork itself."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path

import pytest

from tests.forking import Forked, call, run

ROOT = Path(__file__).parents[2]


def report(path: str) -> None:
    """Write what is particular to this process."""
    preloaded = sys.modules.get("tests.forking_preload")
    facts = {
        "preloaded_from": None if preloaded is None else preloaded.__file__,
        "has_torch": "torch" in sys.modules,
        "parent": os.getppid(),
    }
    Path(path).write_text(json.dumps(facts), "utf-8")


def end(code: int) -> None:
    sys.exit(code)


def facts_of_a_fork(folder: Path) -> dict[str, object]:
    call(report, str(folder / "facts.json"))
    facts: dict[str, object] = json.loads((folder / "facts.json").read_text("utf-8"))
    return facts


def test_a_fork_has_the_modules_of_this_checkout(tmp_path: Path) -> None:
    facts = facts_of_a_fork(tmp_path)
    assert facts["preloaded_from"] == str(ROOT / "tests" / "forking_preload.py")
    assert facts["has_torch"]


def test_a_process_of_pytest_xdist_is_a_fork_of_the_same_server(tmp_path: Path) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("runs with --numprocesses only")
    assert facts_of_a_fork(tmp_path)["parent"] == os.getppid()
    assert multiprocessing.get_start_method() != "forkserver" or sys.version_info >= (3, 14)


def test_exit_codes_are_reported() -> None:
    with pytest.raises(RuntimeError, match="end ended with exit code 3"):
        call(end, 3)
    assert Forked(end, 7).wait(60) == 7


def test_a_program_ends_with_its_output(tmp_path: Path) -> None:
    done = run(("-m", "platform", "--terse"), tmp_path, dict(os.environ))
    assert done.returncode == 0 and "Linux" in done.stdout
