"""How much is taken on: queued jobs, room on the disk, and requests a second."""

from __future__ import annotations

import math
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from sqlalchemy.orm import Session

from service.db.queries import jobs
from service.errors import LowDiskError, TooManyJobsError
from service.settings import Settings

_MEGABYTE = 1_000_000
_MOST_BUCKETS = 10_000


def free_disk_bytes(data_dir: Path) -> int:
    """Room on the disk of the data folder."""
    return shutil.disk_usage(data_dir).free


def has_disk_room(settings: Settings) -> bool:
    """Whether there is room enough on the data folder's disk to begin work."""
    return free_disk_bytes(settings.data_dir) >= settings.min_free_disk_mb * _MEGABYTE


def require_room(session: Session, settings: Settings, api_key_id: str | None) -> None:
    """That one more job may be queued. Raises TooManyJobsError or LowDiskError.

    Requests at the same moment do not see each other's jobs, so the limits may be passed by as many.
    """
    if not has_disk_room(settings):
        raise LowDiskError(f"less than {settings.min_free_disk_mb} MB are free on the service's disk")
    queued, of_key = jobs.count_queued(session, api_key_id)
    if queued >= settings.max_queued_jobs:
        raise TooManyJobsError(f"{settings.max_queued_jobs} jobs are queued already")
    most = settings.max_queued_jobs_per_key
    if api_key_id is not None and of_key >= most:
        raise TooManyJobsError(f"{most} jobs of this key are queued already")


class TokenBuckets:
    """A bucket for each caller: it holds two seconds' worth of requests (at least one) and fills steadily.

    The callers that were quiet for the longest are forgotten first; by then their buckets are full again, as long as
    fewer than 10,000 callers come at once.
    """

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second, self._clock = per_second, clock
        self._size = max(1.0, 2 * per_second)
        self._lock = threading.Lock()
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, caller: str) -> float:
        """Take one request: 0 if there is one, otherwise the seconds until there will be."""
        with self._lock:
            now = self._clock()
            held, since = self._buckets.pop(caller, (self._size, now))
            held = min(self._size, held + (now - since) * self._per_second)
            taken = held >= 1
            self._buckets[caller] = (held - 1 if taken else held, now)
            if len(self._buckets) > _MOST_BUCKETS:
                self._buckets.popitem(last=False)
            return 0.0 if taken else (1 - held) / self._per_second


def retry_after(seconds: float) -> int:
    """Whole seconds for the header Retry-After, at least one."""
    return max(1, math.ceil(seconds))
