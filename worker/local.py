"""`python -m worker.local`: a worker process that claims stages from the database until it is stopped.

It stops on SIGTERM, on SIGINT, and when its standard input closes (the service that started it has ended).
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING

from dfusion.imports import without_garbage_collection
from service import logs
from service.db.unit_of_work import WORKER_POOL, is_transient
from service.errors import StartError
from service.jobs import execution, limits
from service.pulse import Pulse
from service.service import Service
from service.settings import Settings
from service.states import QueueName
from worker.presence import Presence
from worker.watchdog import Watchdog

if TYPE_CHECKING:
    from worker.workbench import Workbench

_OUTAGE_PAUSE_SECONDS = 1.0
_logger = logging.getLogger(__name__)


def main() -> None:
    """Work until stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", help="name of this worker; host and process id if not given")
    parser.add_argument("--pulse", type=int, metavar="FD", help="open file that the parent watches for signs of life")
    parser.add_argument("--alone", action="store_true", help="do not stop when standard input closes")
    arguments = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if not arguments.alone:
        threading.Thread(target=_stop_with_parent, args=(stop,), name="parent-watch", daemon=True).start()

    settings = Settings.or_exit()
    logs.configure(settings)
    os.setpriority(os.PRIO_PROCESS, 0, max(settings.worker_niceness, os.getpriority(os.PRIO_PROCESS, 0)))
    watchdog = Watchdog(settings, None if arguments.pulse is None else Pulse(arguments.pulse))
    watchdog.start()

    name = arguments.name or f"{socket.gethostname()}-{os.getpid()}"
    with logs.about(worker=name):
        work(settings, name, stop, watchdog)


def _stop_with_parent(stop: threading.Event) -> None:
    # os.read releases the GIL, so the process can end while this thread is blocked in it
    while os.read(sys.stdin.fileno(), 1024):
        pass
    stop.set()


def work(settings: Settings, owner: str, stop: threading.Event, watchdog: Watchdog | None = None) -> None:
    """Claim and run stages until `stop` is set."""
    with without_garbage_collection():
        import worker.runner  # noqa: F401  (with all that its stages need)
        from worker.workbench import Workbench, require_devices, set_up_torch

    try:
        require_devices(settings)
        set_up_torch(settings)
        service = Service.open(settings, migrates=False, pool=WORKER_POOL)
    except StartError as error:
        raise SystemExit(f"cannot start: {error}") from error
    bench = Workbench.of(service, watchdog)
    _logger.info("%s is ready", owner)
    queues = tuple(QueueName)
    presence = Presence(settings, owner, queues, lambda: service.uow, bench.about)
    presence.start()
    try:
        while not stop.is_set():
            try:
                worked = _run_next(bench, owner, stop)
            except Exception as error:
                if not is_transient(error):
                    raise
                _logger.warning("database unavailable; retrying: %s", type(error).__name__)
                stop.wait(_OUTAGE_PAUSE_SECONDS)
            else:
                stop.wait(0 if worked else settings.poll_seconds)
    finally:
        presence.stop()
        service.close()


def _run_next(bench: Workbench, owner: str, stop: threading.Event) -> bool:
    """Claim and run a stage, if one is free. Returns whether it ran one."""
    from worker.runner import run_stage

    settings = bench.settings
    if not limits.has_disk_room(settings):
        _logger.warning("disk nearly full; not starting any stage")
        stop.wait(settings.sweep_seconds)
        return False

    claim = execution.claim(bench.uow, settings, owner, prefer_base=bench.models.preferred)
    if claim is not None and not run_stage(bench, claim, stop):
        raise SystemExit("the device may be unusable after an error; exiting so that this worker is restarted")
    return claim is not None


if __name__ == "__main__":
    main()
