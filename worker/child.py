"""State of a Celery worker's child process between stages. The first stage imports torch."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from dfusion.imports import without_garbage_collection
from service.broker import open_queue
from service.db.unit_of_work import WORKER_POOL
from service.jobs import execution, limits
from service.service import Service
from service.settings import Settings
from worker.presence import Presence
from worker.stop_flag import Stop
from worker.watchdog import Watchdog

if TYPE_CHECKING:
    from worker.workbench import Workbench

_OUTAGE_PAUSE_SECONDS = 1.0
_logger = logging.getLogger(__name__)


class Child:
    """The installation opened in this process, and the models that stay loaded."""

    def __init__(self, settings: Settings, name: str, queues: Sequence[str], stop: Stop, watchdog: Watchdog) -> None:
        self._settings = settings
        self._name = name
        self._queues = tuple(queues)
        self._stop = stop
        self._watchdog = watchdog
        self._queue = open_queue(settings)
        self._opening = threading.Lock()
        self._service: Service | None = None
        self._presence = Presence(settings, name, self._queues, lambda: self.service.uow, self._about)

    def begin(self) -> None:
        """Lower the CPU priority (`worker_niceness`), and report this worker from now on."""
        os.setpriority(os.PRIO_PROCESS, 0, max(self._settings.worker_niceness, os.getpriority(os.PRIO_PROCESS, 0)))
        self._watchdog.start()
        self._presence.start()

    def end(self) -> None:
        """Remove this worker's report and close the installation."""
        self._presence.stop()
        self._watchdog.stop()
        if self._service is not None:
            self._service.close()

    @property
    def service(self) -> Service:
        """The installation, opened on first use. Raises StartError or an error of the database."""
        with self._opening:
            if self._service is None:
                self._service = Service.open(self._settings, self._queue, migrates=False, pool=WORKER_POOL)
            return self._service

    @cached_property
    def bench(self) -> Workbench:
        """The workbench, created on first use."""
        with without_garbage_collection():
            import worker.runner  # noqa: F401  (with all that its stages need)
            from worker.workbench import Workbench, require_devices, set_up_torch

        require_devices(self._settings)
        set_up_torch(self._settings)
        return Workbench.of(self.service, self._watchdog)

    def take_hint(self, stage_id: str, queue_name: str) -> bool:
        """Run a free stage of this worker's queues, if there is one.

        It need not be the hinted stage: a hint only announces work. A stopping worker forwards the hint. A worker that
        finds nothing hints again if a stage has become free since.

        Returns:
            Whether this process can run another stage.

        Raises:
            DBAPIError, ServiceError: The database or the storage is unavailable. The hint is sent again.
        """
        if self._stop.is_set():
            self._queue.hint([(stage_id, queue_name)])
            return True
        if not limits.has_disk_room(self._settings):
            _logger.warning("disk nearly full; not starting any stage")  # the sweeper repeats the hint later
            return True
        try:
            bench = self.bench  # before the claim, since no lease is renewed while torch is imported
            preferred = bench.models.preferred
            claim = execution.claim(self.service.uow, self._settings, self._name, self._queues, preferred)
            if claim is None:
                execution.hint_again(self.service.uow, self._queues)
                return True
        except Exception:
            time.sleep(_OUTAGE_PAUSE_SECONDS)  # since this worker would receive the hint again immediately
            self._queue.hint([(stage_id, queue_name)])
            raise
        from worker.runner import run_stage

        return run_stage(bench, claim, self._stop)

    def _about(self) -> tuple[str, str | None, int | None]:
        bench: Workbench | None = self.__dict__.get("bench")
        return (self._settings.device, None, None) if bench is None else bench.about()
