"""A liveness counter of a child process, in memory that it shares with its parent."""

from __future__ import annotations

import mmap
import time

_MAX_INTERVAL_SECONDS = 2.0
"""The maximum time that counts between two checks of a pulse."""
_MIN_SILENCE_SECONDS = 30.0
"""A healthy child may be silent for seconds: when it starts, or when the machine is overloaded."""


class Pulse:
    """A counter that a child process increments to show that it runs.

    It uses no lock, so that a killed child cannot leave one held.

    Args:
        descriptor: A file of at least one byte that both processes have open. Memory that forked children share if it
            is not given.
    """

    def __init__(self, descriptor: int = -1) -> None:
        self._counter = mmap.mmap(descriptor, 1)

    def beat(self) -> None:
        """Show that this process runs."""
        self._counter[0] = (self._counter[0] + 1) % 256

    @property
    def count(self) -> int:
        """The number of beats, modulo 256."""
        return self._counter[0]


class PulseMonitor:
    """Measures in the parent how long a child has been silent.

    Time in which the parent itself was stopped does not count, since the child was probably stopped, too: by a
    suspended laptop or a paused container.

    Args:
        pulse: The child's pulse.
        lease_seconds: The duration of a lease. A child that is silent for longer has lost its lease.
    """

    def __init__(self, pulse: Pulse, lease_seconds: float) -> None:
        self._pulse = pulse
        self._max_seconds = max(lease_seconds, _MIN_SILENCE_SECONDS)
        self.restart()

    def restart(self) -> None:
        """Begin to measure a new child."""
        self._count = self._pulse.count
        self._silent_seconds = 0.0
        self._looked_at = time.monotonic()

    def is_hung(self) -> bool:
        """Whether the child has been silent for too long. Call this at least every two seconds."""
        now = time.monotonic()
        interval = min(now - self._looked_at, _MAX_INTERVAL_SECONDS)
        self._looked_at = now

        count = self._pulse.count
        self._silent_seconds = 0.0 if count != self._count else self._silent_seconds + interval
        self._count = count
        return self._silent_seconds > self._max_seconds

    @property
    def silent_seconds(self) -> float:
        """How long the child had been silent at the last call of `is_hung`, in seconds."""
        return self._silent_seconds
