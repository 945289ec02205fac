"""Rate limits per caller, counted in this process."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

_MAX_BUCKETS = 10_000


class TokenBuckets:
    """One bucket per caller. It holds two seconds' worth of requests (at least one) and fills at a constant rate.

    Least recently seen callers are evicted first. With fewer than 10,000 active callers, evicted buckets are full.
    """

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._clock = clock
        self._size = max(1.0, 2 * per_second)
        self._lock = threading.Lock()
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, caller: str) -> float:
        """Take one request. Returns 0 if it is allowed, otherwise the seconds to wait."""
        with self._lock:
            now = self._clock()
            held, since = self._buckets.pop(caller, (self._size, now))
            held = min(self._size, held + (now - since) * self._per_second)
            allowed = held >= 1
            self._buckets[caller] = (held - 1 if allowed else held, now)
            if len(self._buckets) > _MAX_BUCKETS:
                self._buckets.popitem(last=False)
            return 0.0 if allowed else (1 - held) / self._per_second


class ExpiringSet:
    """A set of at most 10,000 texts, each for a time. The oldest are evicted first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._until: OrderedDict[str, float] = OrderedDict()

    def add(self, text: str, seconds: float) -> None:
        """Add a text for this time."""
        with self._lock:
            self._until.pop(text, None)
            self._until[text] = self._clock() + seconds
            if len(self._until) > _MAX_BUCKETS:
                self._until.popitem(last=False)

    def seconds_left(self, text: str) -> float:
        """How long the text is in the set; 0 if it is not."""
        with self._lock:
            return max(0.0, self._until.get(text, 0.0) - self._clock())


def retry_after(seconds: float) -> int:
    """Whole seconds for the header Retry-After, at least one."""
    return max(1, math.ceil(seconds))
