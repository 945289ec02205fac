"""Hints to workers: "this stage may be free". The database is the truth; a hint may be lost, doubled or late."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

Hint = tuple[str, str]
"""A stage's id and the name of its queue."""


class Queue(Protocol):
    """Where hints go."""

    def hint(self, stages: Sequence[Hint]) -> None:
        """Say that these stages are free. Best effort: never raises, never waits for the broker."""

    def close(self) -> None:
        """Give connections back; what was not sent within a moment is lost."""


class SilentQueue:
    """Embedded mode: workers look into the database by themselves."""

    def hint(self, stages: Sequence[Hint]) -> None:
        """Nobody listens."""

    def close(self) -> None:
        """Nothing is open."""
