"""The only Celery task: a hint that a stage is ready."""

from __future__ import annotations

import signal
from typing import Any

from celery import Task
from celery.signals import worker_process_init, worker_process_shutdown

from service.broker import RUN_STAGE
from worker.celery_app import app, pulse, settings, stop
from worker.child import Child
from worker.watchdog import Watchdog


class StageTask(Task):  # type: ignore[misc]
    """The task, with the state of its child process."""

    child: Child
    """Exists from the start of the process to its end."""


@app.task(name=RUN_STAGE, base=StageTask, bind=True)  # type: ignore[untyped-decorator]
def run_stage(self: StageTask, stage_id: str) -> None:
    """Run a free stage, if there is one. Raises SystemExit if the process must be replaced."""
    if not self.child.take_hint(stage_id, self.request.delivery_info["routing_key"]):
        raise SystemExit(1)


@worker_process_init.connect  # type: ignore[untyped-decorator]
def _begin(sender: str, **_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to the whole process group; the parent sets the flag instead
    queues = tuple(app.amqp.queues.consume_from)
    run_stage.child = Child(settings, sender, queues, stop, Watchdog(settings, pulse))
    run_stage.child.begin()


@worker_process_shutdown.connect  # type: ignore[untyped-decorator]
def _end(**_: Any) -> None:
    run_stage.child.end()
