"""Deployed mode's messages: Celery over Redis. Nothing depends on their arrival (docs/decisions/013-queue.md)."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence

from celery import Celery
from kombu import Exchange
from kombu import Queue as KombuQueue
from redis import Redis

from service.queue import Hint, Queue, SilentQueue
from service.settings import Settings
from service.states import QueueName

RUN_STAGE = "worker.tasks.run_stage"
_MOST_WAITING = 10_000
_LAST_MOMENT_SECONDS = 1.0
_PING_SECONDS = 1.0
_logger = logging.getLogger(__name__)


def make_celery(settings: Settings) -> Celery:
    """A Celery application on the settings' broker; it is not made the process's current one."""
    app = Celery("dfusion", broker=settings.broker, set_as_current=False)
    app.conf.update(
        task_acks_late=False,  # the database says what is left to do; a message that comes back would only repeat it
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        task_queues=[KombuQueue(name, Exchange(name), name) for name in settings.worker_queues],
        task_default_queue=QueueName.GPU.value,
        worker_concurrency=1,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_max_memory_per_child=settings.worker_max_memory_mb * 1024 or None,
        worker_soft_shutdown_timeout=60,
        worker_proc_alive_timeout=60,
        worker_hijack_root_logger=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,  # a stage needs no broker
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={"socket_timeout": 10, "socket_connect_timeout": 5, "health_check_interval": 25},
    )
    return app


def ping(settings: Settings) -> None:
    """Ask the broker for a sign of life. Raises RedisError, within about a second."""
    with Redis.from_url(
        settings.broker, socket_connect_timeout=_PING_SECONDS, socket_timeout=_PING_SECONDS, retry=None
    ) as client:
        client.ping()


def open_queue(settings: Settings) -> Queue:
    """The queue of this installation: silent where there is no broker."""
    return CeleryQueue(make_celery(settings)) if settings.broker else SilentQueue()


class CeleryQueue:
    """Sends hints from a thread of its own: a broker that is away or slow holds nobody up.

    The thread starts with the first hint, so a process may fork before it. What cannot be sent is dropped and logged:
    the sweeper sends it again.
    """

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._waiting: queue.Queue[Hint | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._send_all, name="hints", daemon=True)
        self._lock = threading.Lock()

    def hint(self, stages: Sequence[Hint]) -> None:
        """Hand the hints to the sending thread."""
        with self._lock:
            if self._thread.ident is None:
                self._thread.start()
        for number, one in enumerate(stages):
            try:
                self._waiting.put_nowait(one)
            except queue.Full:
                _logger.warning("%d hints are dropped: too many wait for the broker", len(stages) - number)
                return

    def close(self) -> None:
        """Give the last hints a moment."""
        if self._thread.ident is not None:
            try:
                self._waiting.put_nowait(None)
            except queue.Full:
                return
            self._thread.join(_LAST_MOMENT_SECONDS)

    def _send_all(self) -> None:
        while (one := self._waiting.get()) is not None:
            self._send(*one)
        self._app.close()

    def _send(self, stage_id: str, queue_name: str) -> None:
        try:
            self._app.send_task(RUN_STAGE, args=[stage_id], queue=queue_name, retry=False, ignore_result=True)
        except Exception as error:  # a hint is best effort: whatever is wrong with the broker, it is only late
            _logger.warning("no hint for %s: %s", stage_id, type(error).__name__)
