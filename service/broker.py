"""Hints in deployed mode: Celery over Redis. Nothing depends on their delivery (docs/decisions/013-queue.md).

Imports Celery and Redis on first use, since an installation without a broker needs neither.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from service.queue import MAX_WAITING_HINTS, Hint, Queue, SilentQueue
from service.settings import Settings
from service.states import QueueName

if TYPE_CHECKING:
    from celery import Celery
    from redis import Redis

RUN_STAGE = "worker.tasks.run_stage"
_MAX_PENDING_HINTS = 10_000
_CLOSE_SECONDS = 1.0
_PING_SECONDS = 1.0
_CHECK_EVERY = 100
"""Hints that are sent to a queue before its length is checked again; other processes send theirs at the same time."""
_logger = logging.getLogger(__name__)


def make_celery(settings: Settings) -> Celery:
    """A Celery application on the broker of the settings. It does not become the process's current application."""
    from celery import Celery
    from kombu import Exchange
    from kombu import Queue as KombuQueue

    app = Celery("dfusion", broker=settings.broker, set_as_current=False)
    app.conf.update(
        # messages
        task_acks_late=False,  # the database knows what is left to do, so redelivery would only repeat it
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        task_queues=[KombuQueue(name, Exchange(name), name) for name in settings.worker_queues],
        task_default_queue=QueueName.GPU.value,
        # one stage at a time per worker
        worker_concurrency=1,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_max_memory_per_child=settings.worker_max_memory_mb * 1024 or None,
        worker_soft_shutdown_timeout=60,
        worker_proc_alive_timeout=60,
        worker_hijack_root_logger=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,  # a running stage does not need the broker
        # the connection
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={"socket_timeout": 10, "socket_connect_timeout": 5, "health_check_interval": 25},
    )
    return app


def ping(settings: Settings) -> None:
    """Check that the broker answers. Raises RedisError within about a second."""
    with _redis(settings.broker) as client:
        client.ping()


def _redis(url: str) -> Redis:
    from redis import Redis

    return Redis.from_url(url, socket_connect_timeout=_PING_SECONDS, socket_timeout=_PING_SECONDS, retry=None)


def open_queue(settings: Settings) -> Queue:
    """The queue of this installation: Celery, or a SilentQueue if no broker is configured."""
    return CeleryQueue(make_celery(settings)) if settings.broker else SilentQueue()


class CeleryQueue:
    """Sends hints from a background thread, so that a slow or unreachable broker never blocks callers.

    The thread starts with the first hint, so a process can fork before it. A hint that cannot be sent is logged and
    dropped; the sweeper sends it again. So is a hint for a queue that holds about MAX_WAITING_HINTS, since a hint
    stands for any free stage.
    """

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._pending: queue.Queue[Hint | None] = queue.Queue(_MAX_PENDING_HINTS)
        self._thread = threading.Thread(target=self._send_all, name="hints", daemon=True)
        self._lock = threading.Lock()
        self._room: dict[str, int] = {}

    def hint(self, stages: Sequence[Hint]) -> None:
        """Queue the hints for the background thread."""
        with self._lock:
            if self._thread.ident is None:
                self._thread.start()

        for number, stage in enumerate(stages):
            try:
                self._pending.put_nowait(stage)
            except queue.Full:
                _logger.warning("%d hints dropped: too many are waiting for the broker", len(stages) - number)
                return

    def waiting(self, queue_name: str) -> int | None:
        """The number of hints in the queue, which is a list in Redis."""
        from redis import RedisError

        try:
            with _redis(self._app.conf.broker_url) as client:
                return int(client.llen(queue_name))
        except RedisError:
            return None

    def close(self) -> None:
        """Stop the thread, after at most a second for the hints that are still pending."""
        if self._thread.ident is not None:
            try:
                self._pending.put_nowait(None)
            except queue.Full:
                return
            self._thread.join(_CLOSE_SECONDS)

    def _send_all(self) -> None:
        while (stage := self._pending.get()) is not None:
            if self._has_room(stage[1]):
                self._send(*stage)
        self._app.close()

    def _has_room(self, queue_name: str) -> bool:
        """Whether the queue can take one more hint. Its length is checked for the first of _CHECK_EVERY hints."""
        if self._room.get(queue_name, 0) <= 0:
            waiting = self.waiting(queue_name) or 0
            self._room[queue_name] = min(_CHECK_EVERY, MAX_WAITING_HINTS - waiting)
        self._room[queue_name] -= 1
        return self._room[queue_name] >= 0

    def _send(self, stage_id: str, queue_name: str) -> None:
        try:
            self._app.send_task(RUN_STAGE, args=[stage_id], queue=queue_name, retry=False, ignore_result=True)
        except Exception as error:  # best effort: whatever fails at the broker, the hint is only late
            _logger.warning("cannot send the hint for %s: %s", stage_id, type(error).__name__)
