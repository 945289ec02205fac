"""Keeps a stage's lease while it runs, and tells the stage when to stop."""

from __future__ import annotations

import logging
import threading
from contextvars import copy_context
from types import TracebackType

from sqlalchemy.exc import SQLAlchemyError

from service.db.queries.stages import Wish
from service.errors import LeaseLostError, StageCancelledError, StagePausedError, StageStoppedError
from service.jobs import execution
from service.jobs.execution import Claim
from worker.stop_flag import Stop
from worker.workbench import Workbench

_logger = logging.getLogger(__name__)


class Heartbeat:
    """Within its block a thread renews the lease with the progress made; `step` raises when the stage must stop."""

    def __init__(self, bench: Workbench, claim: Claim, stop: Stop) -> None:
        self._bench, self._claim, self._stop = bench, claim, stop
        self._over = threading.Event()
        self._lost = threading.Event()
        self._wish = Wish.GO_ON
        self._done, self._total = 0, 0
        self._thread = threading.Thread(target=copy_context().run, args=(self._run,), name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    @property
    def total(self) -> int:
        """How many steps the stage has, as far as it was said."""
        return self._total

    def plan(self, total: int) -> None:
        """Say how many steps the stage has."""
        self._total = total

    def step(self, count: int = 1) -> None:
        """Some steps are done. Raises LeaseLostError, StageCancelledError, StagePausedError or StageStoppedError."""
        self.check()
        self._done += count

    def at(self, done: int) -> None:
        """So many steps are done in all. Raises as `step` does."""
        self.check()
        self._done = done

    def check(self) -> None:
        """Whether the stage may go on; raises as `step` does."""
        if self._lost.is_set():
            raise LeaseLostError(f"the lease on {self._claim.stage_id} is lost")
        if self._wish is Wish.CANCEL:
            raise StageCancelledError("a cancel was asked for")
        if self._wish is Wish.PAUSE:
            raise StagePausedError("a pause was asked for")
        if self._stop.is_set():
            raise StageStoppedError("this worker is asked to stop")

    def _run(self) -> None:
        settings = self._bench.settings
        while not self._over.wait(settings.heartbeat_seconds):
            try:
                self._wish = execution.beat(self._bench.uow, settings, self._claim, self._done, self._total)
            except LeaseLostError:
                self._lost.set()
                return
            except SQLAlchemyError as error:  # the lease may last until the database is back
                _logger.warning("no heartbeat for %s: %s", self._claim.stage_id, error)
