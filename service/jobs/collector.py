"""Removes from the storage what no row names: leftovers of lost attempts, old checkpoints, unwanted trajectories.

Rows go first, in small transactions, objects after them: what a failure leaves is an object without a row, which the
next collection finds. Collections that run at once do no harm to each other, nor to workers that write meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from sqlalchemy.orm import Session

from service.db.queries import collection
from service.db.unit_of_work import UnitOfWork
from service.settings import Settings
from service.storage import Store, stage_of_key

_PAGE = 500
_ROWS = 20
"""Rows that one transaction forgets: each of a trajectory's artifact is looked for in all samples."""


@dataclass(frozen=True)
class Collected:
    """How many of each were removed."""

    objects: int
    checkpoints: int
    trajectories: int
    scratch_folders: int


def collect(uow: UnitOfWork, store: Store, settings: Settings) -> Collected:
    """Remove what may go. Raises StorageError; the rest is then left to the next collection."""
    keep = settings.keep_trajectories
    return Collected(
        scratch_folders=store.remove_dead_scratch(settings.collect_after_seconds),
        checkpoints=_forget(uow, store, lambda session: collection.forget_checkpoints(session, _ROWS)),
        trajectories=0
        if keep == "all"
        else _forget(uow, store, lambda session: collection.forget_trajectories(session, keep == "pairs", _ROWS)),
        objects=_remove_unnamed(uow, store, settings.collect_after_seconds),
    )


def _forget(uow: UnitOfWork, store: Store, forget: Callable[[Session], list[str]]) -> int:
    """Remove the objects whose keys `forget` returns, until it returns none; how many there were."""
    count = 0
    while True:
        with uow.writing() as session:
            keys = forget(session)
        for key in keys:
            store.remove(key)
        if not keys:
            return count
        count += len(keys)


def _remove_unnamed(uow: UnitOfWork, store: Store, older_than_seconds: float) -> int:
    old = (found.key for found in store.objects() if found.age_seconds >= older_than_seconds)
    count = 0
    for page in _pages(old):
        with uow.reading() as session:
            keys = collection.unnamed(session, page)
        for key in sorted(keys):
            store.remove(key)
        count += len(keys)
    return count


def _pages(keys: Iterator[str]) -> Iterator[dict[str, str]]:
    """Keys with their stages, so many at a time."""
    known = ((key, stage_id) for key in keys if (stage_id := stage_of_key(key)) is not None)
    while page := dict(islice(known, _PAGE)):
        yield page
