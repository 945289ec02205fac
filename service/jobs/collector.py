"""Removes unreferenced objects from the storage: leftovers of lost attempts, old checkpoints, expired trajectories.

Rows are deleted first, in small transactions, then their objects. A failure leaves objects without rows, which the next
collection removes. Concurrent collections and workers do not interfere.
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
"""Rows of one transaction. It is small because each trajectory is looked up in all samples."""


@dataclass(frozen=True)
class Collected:
    """The numbers of removed objects, checkpoints, trajectory files and scratch folders."""

    objects: int
    checkpoints: int
    trajectories: int
    scratch_folders: int


def collect(uow: UnitOfWork, store: Store, settings: Settings) -> Collected:
    """Remove everything that is no longer referenced.

    Raises:
        StorageError: The storage is unavailable. The next collection removes the rest.
    """
    keep = settings.keep_trajectories

    # 1. folders of dead processes
    scratch_folders = store.remove_dead_scratch(settings.collect_after_seconds)

    # 2. objects whose rows are no longer needed
    checkpoints = _delete(uow, store, lambda session: collection.forget_checkpoints(session, _ROWS))
    trajectories = 0
    if keep != "all":
        keep_pairs = keep == "pairs"
        trajectories = _delete(uow, store, lambda session: collection.forget_trajectories(session, keep_pairs, _ROWS))

    # 3. objects without rows
    objects = _remove_unreferenced(uow, store, settings.collect_after_seconds)
    return Collected(objects, checkpoints, trajectories, scratch_folders)


def _delete(uow: UnitOfWork, store: Store, forget: Callable[[Session], list[str]]) -> int:
    """Remove the objects whose keys `forget` returns, until it returns none. Returns their number."""
    count = 0
    while True:
        with uow.writing() as session:
            keys = forget(session)
        for key in keys:
            store.remove(key)

        if not keys:
            return count
        count += len(keys)


def _remove_unreferenced(uow: UnitOfWork, store: Store, min_age_seconds: float) -> int:
    """Remove the objects of this age that no row references. Returns their number."""
    old_keys = (stored.key for stored in store.objects() if stored.age_seconds >= min_age_seconds)
    count = 0
    for page in _pages(old_keys):
        with uow.reading() as session:
            keys = collection.unreferenced(session, page)
        for key in sorted(keys):
            store.remove(key)
        count += len(keys)
    return count


def _pages(keys: Iterator[str]) -> Iterator[dict[str, str]]:
    """Pages of keys with the stages that wrote them. Keys of unknown form are skipped."""
    with_stages = ((key, stage_id) for key in keys if (stage_id := stage_of_key(key)) is not None)
    while page := dict(islice(with_stages, _PAGE)):
        yield page
