"""What starting each program costs, next to an earlier version: `python -m benchmarks.startup [--before HEAD~10]`.

CPU seconds (user and system, the least of several starts) and peak memory, of programs that end at once, of the service
and its worker until they are ready, and of loading the shapes model with its scorer in a worker. The earlier version is
a revision of git, in the same environment. The floor is the import of the packages that a worker cannot do without.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.earlier import ROOT, checkout_of

_SECONDS = 120
_LOAD = """
import sys, time
import worker.runner
from dfusion import MODELS, DiffusionModel, load_scorer
start = time.process_time()
DiffusionModel.load(MODELS["shapes"].folder)
load_scorer("shapes-clip")
print(time.process_time() - start)
"""
_FLOOR = "import gc; gc.disable(); import dfusion._torchvision_ops, torch, diffusers, transformers, peft"
PROGRAMS: Mapping[str, Sequence[str]] = {
    "dfusion --help": ("-m", "dfusion", "--help"),
    "dfusion jobs --help": ("-m", "dfusion", "jobs", "--help"),
    "dfusion jobs list": ("-m", "dfusion", "jobs", "list"),
    "dfusion doctor": ("-m", "dfusion", "doctor"),
    "parent of a Celery worker": ("-c", "import worker.celery_app"),
    "floor of a worker": ("-c", _FLOOR),
}


@dataclass(frozen=True)
class Start:
    """CPU seconds and peak memory of a start. The memory is None where it says nothing about the start."""

    seconds: float
    memory_bytes: int | None

    @property
    def text(self) -> str:
        """Both, for a table."""
        memory = "" if self.memory_bytes is None else f"{self.memory_bytes / 1e6:.0f} MB"
        return f"{self.seconds:6.2f} s {memory:>7}"


def run(arguments: Sequence[str], checkout: Path, environment: Mapping[str, str]) -> Start:
    """Run Python until it ends."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=checkout,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    # wait4 has the usage of this process and of those that it has waited for
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Start(usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def load(checkout: Path, environment: Mapping[str, str]) -> Start:
    """Load the shapes model and its scorer in a process that has imported what a worker does."""
    output = subprocess.check_output(
        [sys.executable, "-c", _LOAD], cwd=checkout, env=environment, stderr=subprocess.DEVNULL, text=True
    )
    return Start(float(output), None)


def until(arguments: Sequence[str], ready: str, checkout: Path, environment: Mapping[str, str]) -> Start:
    """Run Python until its log has the text `ready`. Raises RuntimeError if it ends before."""
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=checkout,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        )
        try:
            deadline = time.monotonic() + _SECONDS
            while ready not in (text := Path(log.name).read_text("utf-8", "replace")):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{arguments}: it did not start: {text[-1000:]}")
                time.sleep(0.02)
            times = psutil.Process(process.pid).cpu_times()
            memory = psutil.Process(process.pid).memory_info().rss
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate()
    return Start(times.user + times.system, memory)


def starts(checkout: Path, data: Path) -> dict[str, Callable[[], Start]]:
    """What is measured, by name."""
    settings = {
        "DFUSION_DATA_DIR": str(data),
        "DFUSION_EMBEDDED_WORKER": "0",
        "DFUSION_PORT": "0",
        "DFUSION_WORKER_NICENESS": "0",
        "DFUSION_DEVICE": "cpu",
        "DFUSION_URL": "http://127.0.0.1:9",
    }
    environment = os.environ | settings
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    measurements: dict[str, Callable[[], Start]] = {}
    for name, arguments in PROGRAMS.items():
        measurements[name] = lambda arguments=arguments: run(arguments, checkout, environment)  # type: ignore[misc]

    measurements["service without a worker"] = lambda: until(
        ("-m", "api"), "Application startup complete", checkout, environment
    )
    measurements["worker"] = lambda: until(("-m", "worker.local"), "is ready", checkout, environment)
    measurements["shapes model and shapes-clip"] = lambda: load(checkout, environment)
    return measurements


def least(start: Callable[[], Start], runs: int) -> Start:
    """The start with the least CPU time, after one that only compiles the modules."""
    start()
    return min((start() for _ in range(runs)), key=lambda result: result.seconds)


def main(write: Callable[[str], object] = sys.stdout.write) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", metavar="REVISION", help="revision of git to compare with")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", metavar="NAME", action="append", help="only this start; can be repeated")
    arguments = parser.parse_args()

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        versions = {"now": starts(ROOT, folder / "data")}
        if arguments.before:
            checkout = stack.enter_context(checkout_of(arguments.before))
            versions = {arguments.before: starts(checkout, folder / "data-before")} | versions

        write(f"{'':30}" + "".join(f"{version:>20}" for version in versions) + "\n")
        for name in versions["now"]:
            if not arguments.only or name in arguments.only:
                results = (least(version[name], arguments.runs) for version in versions.values())
                write(f"{name:30}" + "".join(f"{result.text:>20}" for result in results) + "\n")


if __name__ == "__main__":
    main()
