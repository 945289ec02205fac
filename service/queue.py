"""Hints to workers that a stage may be free. The database decides; a hint may be lost, repeated or late."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

Hint = tuple[str, str]
"""A stage's id and the name of its queue."""

MAX_WAITING_HINTS = 10_000
"""Hints that one queue of the broker holds, roughly at most. A hint takes about 1 KB there.

Each process looks at the length of the queue once for a hundred hints, so that the queue can exceed this by about a
hundred hints for each process that sends some at the same time.
"""


class Queue(Protocol):
    """Delivers hints to workers."""

    def hint(self, stages: Sequence[Hint]) -> None:
        """Send hints for these stages. Best effort: never raises and never waits for the broker."""

    def waiting(self, queue_name: str) -> int | None:
        """The number of hints that wait for a worker. None if the broker does not answer within about a second."""

    def close(self) -> None:
        """Close all connections. Hints that cannot be sent within a second are dropped."""


class SilentQueue:
    """Drops all hints. Used in embedded mode, where workers poll the database."""

    def hint(self, stages: Sequence[Hint]) -> None:
        """Do nothing."""

    def waiting(self, queue_name: str) -> int | None:  # noqa: ARG002
        """The maximum, so that no hint is ever missing."""
        return MAX_WAITING_HINTS

    def close(self) -> None:
        """Do nothing."""
