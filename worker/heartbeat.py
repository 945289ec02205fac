"""Renews the lease of a running stage, stops the stage on request, and reports its progress to the watchdog."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from types import TracebackType

from sqlalchemy.exc import SQLAlchemyError

from service.db.queries.stages import StopRequest
from service.errors import LeaseLostError, StageCancelledError, StagePausedError, StageStoppedError
from service.jobs import execution
from service.jobs.execution import Claim
from worker.stop_flag import Stop
from worker.workbench import Workbench

_LONGEST_STEPS = 20
"""How much longer than the longest step so far a step may take."""
_logger = logging.getLogger(__name__)


class Heartbeat:
    """Renews a lease from a thread within its `with` block.

    Each renewal also writes the progress. Between two renewals it looks for stop requests without a write. `step`, `at`
    and `check` raise when the stage must stop:

    * LeaseLostError: another worker has the stage.
    * StageCancelledError, StagePausedError: a client requested it.
    * StageStoppedError: this worker is shutting down.

    It also informs the watchdog when the next step is due: within the duration of a lease, or twenty times the longest
    step so far if that is more. Some parts may take minutes and have `stuck_seconds`: everything before the second
    step, since a first step may compile kernels; everything after the last; and each `phase`.
    """

    def __init__(self, bench: Workbench, claim: Claim, stop: Stop) -> None:
        self._bench = bench
        self._claim = claim
        self._stop = stop
        self._ended = threading.Event()
        self._lost = threading.Event()
        self._stop_request = StopRequest.NONE
        self._done = 0
        self._total = 0
        self._step_count = 0
        self._stepped_at = 0.0
        self._longest_step = 0.0
        self._thread = threading.Thread(target=copy_context().run, args=(self._run,), name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._expect("the start of the stage")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bench.watchdog.rest()
        self._ended.set()
        self._thread.join()

    @property
    def total(self) -> int:
        """The number of steps of the stage; 0 until `plan` is called."""
        return self._total

    @property
    def done(self) -> int:
        """The number of finished steps."""
        return self._done

    def plan(self, total: int) -> None:
        """Set the number of steps of the stage."""
        self._total = total

    def step(self, count: int = 1) -> None:
        """Count finished steps. Raises when the stage must stop."""
        self.at(self._done + count)

    def at(self, done: int) -> None:
        """Set the total number of finished steps. Raises when the stage must stop."""
        self.check()
        self._done = done
        self._time_step()
        self._expect(f"after step {done} of {self._total}")

    @contextmanager
    def phase(self, activity: str) -> Iterator[None]:
        """A part of the stage that may take minutes between two steps, such as loading a model."""
        self._bench.watchdog.expect(activity, self._bench.settings.stuck_seconds)
        yield
        self._stepped_at = time.monotonic()
        self._expect(f"after {activity}")

    def _time_step(self) -> None:
        now = time.monotonic()
        self._step_count += 1
        if self._step_count > 1:
            self._longest_step = max(self._longest_step, now - self._stepped_at)
        self._stepped_at = now

    def _expect(self, activity: str) -> None:
        settings = self._bench.settings
        in_steps = self._step_count > 1 and self._done < self._total
        # a later step can be the first of its kind, or have a smaller batch, and is then compiled for minutes
        in_steps = in_steps and not settings.compile_models
        limit = max(settings.lease_seconds, _LONGEST_STEPS * self._longest_step)
        self._bench.watchdog.expect(activity, limit if in_steps else settings.stuck_seconds)

    def check(self) -> None:
        """Raise if the stage must stop."""
        if self._lost.is_set():
            raise LeaseLostError(f"the lease on {self._claim.stage_id} is lost")
        if self._stop_request is StopRequest.CANCEL:
            raise StageCancelledError("cancel requested")
        if self._stop_request is StopRequest.PAUSE:
            raise StagePausedError("pause requested")
        if self._stop.is_set():
            raise StageStoppedError("this worker is stopping")

    def _run(self) -> None:
        """Renew the lease every `heartbeat_seconds`, and look for a cancel or a pause every `stop_check_seconds`."""
        settings = self._bench.settings
        renewal = time.monotonic() + settings.heartbeat_seconds
        while not self._ended.wait(min(settings.stop_check_seconds, max(0.0, renewal - time.monotonic()))):
            is_due = time.monotonic() >= renewal
            try:
                self._stop_request = self._renew() if is_due else execution.stop_request(self._bench.uow, self._claim)
            except LeaseLostError:
                self._lost.set()
                return
            except SQLAlchemyError as error:  # the lease may outlast the outage
                _logger.warning("lease of %s not renewed: %s", self._claim.stage_id, error)
                renewal = time.monotonic() + min(settings.stop_check_seconds, settings.heartbeat_seconds)
            else:
                renewal = time.monotonic() + settings.heartbeat_seconds if is_due else renewal

    def _renew(self) -> StopRequest:
        return execution.renew_lease(self._bench.uow, self._bench.settings, self._claim, self._done, self._total)
