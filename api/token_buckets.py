"""How many requests a second each caller may send."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

_MOST_BUCKETS = 10_000


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
