"""`python -m worker.local`: one worker process that claims stages from the database until it is told to stop.

It stops on SIGTERM, on SIGINT, and when its standard input closes (the service that started it is gone).
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import threading
import time

import torch

from api.core import execution, limits, logs
from api.core.service import Service
from api.core.settings import Settings
from worker.runner import run_stage
from worker.workbench import Workbench

_logger = logging.getLogger(__name__)


def main() -> None:
    """Work until stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", help="this worker's name; its host and process id if not given")
    parser.add_argument("--alone", action="store_true", help="do not stop when standard input closes")
    arguments = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if not arguments.alone:
        threading.Thread(target=_stop_with_parent, args=(stop,), name="parent-watch", daemon=True).start()
    settings = Settings()
    logs.configure(settings)
    if settings.torch_threads:
        torch.set_num_threads(settings.torch_threads)
    name = arguments.name or f"{socket.gethostname()}-{os.getpid()}"
    with logs.about(worker=name):
        work(settings, name, stop)


def _stop_with_parent(stop: threading.Event) -> None:
    # os.read holds no lock of Python's, so this thread may still be in it when the process ends
    while os.read(sys.stdin.fileno(), 1024):
        pass
    stop.set()


def work(settings: Settings, owner: str, stop: threading.Event) -> None:
    """Claim and run one stage after the other until `stop` is set."""
    service = Service.open(settings)
    bench = Workbench.of(service)
    _logger.info("%s is ready", owner)
    next_sweep = 0.0
    try:
        while not stop.is_set():
            if time.monotonic() >= next_sweep:
                execution.sweep(service.uow, settings)
                next_sweep = time.monotonic() + settings.sweep_seconds
            if not limits.has_disk_room(settings):
                _logger.warning("the disk is nearly full; no work is begun")
                stop.wait(settings.sweep_seconds)
                continue
            claim = execution.claim(service.uow, settings, owner)
            if claim is None:
                stop.wait(settings.poll_seconds)
            else:
                run_stage(bench, claim, stop)
    finally:
        service.close()


if __name__ == "__main__":
    main()
