"""The deployed worker: `celery -A worker.celery_app worker -P prefork -c 1 -Q gpu`, one per GPU.

The parent receives hints from the broker and never imports torch; its only child runs stages (worker.child). SIGTERM,
SIGINT and SIGQUIT stop the worker softly: the running stage returns to the queue with its last checkpoint. Celery's
soft shutdown only sleeps and then kills the child without notice (docs/decisions/013-queue.md).
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from functools import partial
from types import FrameType
from typing import Any

from celery import bootsteps
from celery.platforms import EX_OK
from celery.signals import setup_logging
from celery.worker import state

from service import logs
from service.broker import make_celery
from service.pulse import Pulse, PulseMonitor
from service.settings import Settings
from worker.stop_flag import StopFlag

_WATCH_SECONDS = 1.0
_logger = logging.getLogger(__name__)

settings = Settings.or_exit()
app = make_celery(settings)
app.conf.include = ["worker.tasks"]
stop = StopFlag()
pulse = Pulse()
"""The pulse of the only child."""


@setup_logging.connect  # type: ignore[untyped-decorator]
def _log(**_: Any) -> None:
    """Use the service's log format instead of Celery's."""
    logs.configure(settings)


class SoftStop(bootsteps.StartStopStep):  # type: ignore[misc]
    """Replaces Celery's signal handlers, which are installed before any step starts."""

    requires = ("celery.worker.components:Pool",)

    def start(self, worker: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            signal.signal(number, partial(_stop, worker))


def _stop(worker: Any, _number: int, _frame: FrameType | None) -> None:
    """Ask the child to stop and let Celery wait for it (a warm shutdown). A second signal does not wait."""
    wait_seconds = 0.0 if stop.is_set() else settings.worker_stop_seconds
    stop.set()
    state.should_stop = EX_OK
    timer = threading.Timer(wait_seconds, _end_children, [worker])
    timer.daemon = True
    timer.start()


def _end_children(worker: Any) -> None:
    for pid in worker.pool.info["processes"] if worker.pool else ():
        os.kill(pid, signal.SIGKILL)


class HungChild(bootsteps.StartStopStep):  # type: ignore[misc]
    """Kills a child that does not respond for the duration of a lease. Celery replaces it."""

    requires = ("celery.worker.components:Pool",)

    def start(self, worker: Any) -> None:
        threading.Thread(target=_watch_child, args=(worker,), name="child-watch", daemon=True).start()


def _watch_child(worker: Any) -> None:
    monitor = PulseMonitor(pulse, settings.lease_seconds)
    while True:
        time.sleep(_WATCH_SECONDS)
        if monitor.is_hung():
            _logger.error("the child has not responded for %.0f s; replacing it", monitor.silent_seconds)
            _end_children(worker)
            monitor.restart()


app.steps["worker"].add(SoftStop)
app.steps["worker"].add(HungChild)
