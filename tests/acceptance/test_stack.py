"""`python -m api.stack`, with a round that uses all of its parts."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.deployment import PATIENCE_SECONDS, ROOT, until
from tests.following import ended, is_ready
from tests.service import round_body, settings_for


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that PostgreSQL's user can access, unlike pytest's temporary folders."""
    path = Path(tempfile.mkdtemp(prefix="stack-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


def environment(folder: Path, pipeline: Path) -> dict[str, str]:
    quick = {"presence_seconds": 0.2, "rehint_seconds": 1}
    settings = settings_for(folder, pipeline, lease_seconds=PATIENCE_SECONDS, **quick)
    return settings.for_child() | {"PYTHONPATH": str(ROOT)}


@contextmanager
def stack(folder: Path, pipeline: Path) -> Iterator[tuple[psutil.Popen, httpx.Client]]:
    """A running stack with one worker, and a client of it."""
    shown = folder / "shown"
    with shown.open("wb") as output:
        process = psutil.Popen(
            [sys.executable, "-m", "api.stack", "--api-port", "0", "--workers", "1"],
            cwd=folder,
            env=environment(folder, pipeline),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )

    def url() -> str:
        assert process.poll() is None, shown.read_text()
        match = re.search(r"API +(http://\S+)", shown.read_text())
        return match[1] if match else ""

    try:
        with httpx.Client(base_url=until(url), timeout=70) as client:
            yield process, client
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(PATIENCE_SECONDS)


def part_of(process: psutil.Popen, words: str) -> psutil.Process:
    """Return the process of the program, not that of its guard."""
    processes = [child for child in process.children(recursive=True) if words in " ".join(child.cmdline())]
    return next(child for child in processes if "api.stack.guard" not in child.cmdline())


def second_start(folder: Path, pipeline: Path, *arguments: str) -> Any:
    return subprocess.run(
        [sys.executable, "-m", "api.stack", *arguments],
        env=environment(folder, pipeline),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_round_outlives_dead_parts_and_nothing_outlives_a_killed_stack(folder: Path, pipeline: Path) -> None:
    with stack(folder, pipeline) as (process, client):
        again = second_start(folder, pipeline)
        assert (again.returncode, f"a stack already runs in {folder}/stack" in again.stderr) == (1, True)
        job_id = client.post("/rounds", json=round_body()).json()["id"]
        api, redis = part_of(process, "-m api"), part_of(process, "redis-server")
        api.kill()
        redis.kill()
        until(lambda: not api.is_running() and is_ready(client, process))  # type: ignore[arg-type]
        job = ended(client, job_id)
        assert (job["state"], job["outputs"]["models"]) == ("succeeded", 1)
        kill(process)


def kill(process: psutil.Popen) -> None:
    """Kill the stack. All its processes must end."""
    family = process.children(recursive=True)
    assert len(family) > 12  # six parts with their guards, and PostgreSQL's own
    os.kill(process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(family, PATIENCE_SECONDS)
    assert alive == []


@pytest.mark.long
def test_a_killed_stack_starts_again_and_ends_with_its_terminal(folder: Path, pipeline: Path) -> None:
    with stack(folder, pipeline) as (process, client):
        job_id = client.post("/rounds", json=round_body()).json()["id"]
        kill(process)
    with stack(folder, pipeline) as (process, client):
        assert ended(client, job_id)["state"] == "succeeded"
        family = process.children(recursive=True)
        process.send_signal(signal.SIGHUP)  # the terminal is closed
        assert process.wait(PATIENCE_SECONDS) == 0
        assert [member for member in family if member.is_running()] == []


def test_a_port_that_is_taken_is_named(folder: Path, pipeline: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        result = second_start(folder, pipeline, "--s3-port", str(port))
    assert result.returncode == 1
    assert f"port {port} is in use: choose another with --s3-port" in result.stderr
