"""Hints to workers: "this stage may be free". The database is the truth; a hint may be lost, doubled or late."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from api.core.states import StageKind

GPU, CPU = "gpu", "cpu"
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


def queue_of(kind: StageKind) -> str:
    """The queue of a kind of stage: `gpu` where a model or a scorer runs."""
    return CPU if kind is StageKind.SELECT else GPU


def kinds_of(queues: Sequence[str]) -> list[StageKind]:
    """The kinds of stages that these queues carry."""
    return [kind for kind in StageKind if queue_of(kind) in queues]
