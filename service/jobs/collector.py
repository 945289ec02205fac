"""Removes what is no longer needed: leftovers of lost attempts, old checkpoints, expired trajectories, deleted jobs.

It also applies the settings that limit the age of jobs, events and idempotency keys, and removes old deliveries of
webhooks.

It works in batches: small transactions, and the objects of a few stages. A run does as many batches as its time allows,
and the next run continues there. What was collected is marked, so that a collection with nothing to do reads
no storage and few rows.

Rows are deleted first, then their objects. A failure in between leaves objects without rows; their stage is marked as
uncollected in the transaction that deletes the rows, so that a later collection removes them. Concurrent collections
and workers do not interfere.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Protocol

from sqlalchemy.orm import Session

from service.db.queries import collection, deletion, jobs, webhooks
from service.db.queries.collection import START, EndedStage, Position, TrajectoryFile
from service.db.unit_of_work import UnitOfWork, repeatable
from service.errors import ConflictError, NotFoundError
from service.jobs import execution
from service.jobs.deletion import delete_job
from service.jobs.sources import TRAJECTORY_READERS, trajectory_sources
from service.settings import Settings
from service.states import JobState
from service.storage import ListedObject, Store, job_folder, stage_folder, stage_of_key

_STAGES = 20
"""Stages of one batch."""
_KEYS = 500
"""Keys of one view of the database."""
_CHECKPOINTS = 20
"""Checkpoints of one transaction."""
_ARTIFACTS = 500
"""Artifacts of one view, of which those that are trajectories are forgotten in one transaction."""
_SAMPLES = 1000
"""Samples of one transaction."""
_ROWS = 500
"""Rows of one transaction that deletes events, idempotency keys, or rows of a deleted job."""
_JOBS = 20
"""Jobs of one view, of which those that are too old are deleted."""
_DAY = 86_400.0
_DELIVERY_DAYS = 30.0
"""How long deliveries are listed, and webhooks after they were disabled."""


@dataclass(frozen=True)
class Collected:
    """The numbers of removed objects, checkpoints, trajectory files and scratch folders.

    Attributes:
        objects: Leftovers, and objects of deleted jobs.
        checkpoints: Checkpoints.
        trajectories: Files of trajectories.
        scratch_folders: Scratch folders.
        expired_jobs: Jobs that were deleted because of their age.
        events: Old events of ended jobs.
        keys: Old idempotency keys.
        deliveries: Old deliveries, and webhooks that were disabled long ago.
        complete: False if the run ended before everything was looked at.
    """

    objects: int
    checkpoints: int
    trajectories: int
    scratch_folders: int
    expired_jobs: int = 0
    events: int = 0
    keys: int = 0
    deliveries: int = 0
    complete: bool = True


class _Task(Protocol):
    """A part of the collection."""

    def batch(self) -> int | None:
        """Do a bounded amount of work. Returns the number of removals; None at the end, to start over."""
        ...


class Collector:
    """Collects in runs. It holds the position from which the next run continues, and at most a batch in memory."""

    def __init__(self, uow: UnitOfWork, store: Store, settings: Settings) -> None:
        self._store = store
        self._after_seconds = settings.collect_after_seconds
        self._tasks: dict[str, _Task] = {
            "checkpoints": _Checkpoints(uow, store, settings.collect_after_seconds),
            "trajectories": _Trajectories(uow, store, settings),
            "expired_jobs": _ExpiredJobs(uow, settings),
            "caches": _Caches(uow),
            "deleted_jobs": _DeletedJobs(uow, store, settings.collect_after_seconds),
            "objects": _Leftovers(uow, store, settings.collect_after_seconds),
            "events": _Aged(uow, settings.retain_events_days, deletion.forget_old_events),
            "keys": _Aged(uow, settings.retain_idempotency_keys_days, deletion.forget_old_keys),
            "deliveries": _Aged(uow, _DELIVERY_DAYS, webhooks.forget_old),
        }
        self._unfinished: deque[str] = deque()

    def run(self, seconds: float = math.inf, stop: threading.Event | None = None) -> Collected:
        """Collect until nothing is left or the time is over. The tasks take turns.

        Args:
            seconds: No batch but the first starts after this time.
            stop: No batch starts after it is set.

        Raises:
            StorageError: The storage is unavailable. The next run continues after the batch that failed.
        """
        deadline = time.monotonic() + seconds
        removed: Counter[str] = Counter()
        scratch_folders = self._store.remove_dead_scratch(self._after_seconds)

        if not self._unfinished:
            self._unfinished.extend(self._tasks)
        while self._unfinished and not (stop and stop.is_set()):
            name = self._unfinished[0]
            self._unfinished.rotate(-1)  # before the batch, so that a failing task does not block the others
            count = self._tasks[name].batch()
            if count is None:
                self._unfinished.remove(name)
            else:
                removed[name] += count
            if time.monotonic() >= deadline:
                break

        return Collected(
            objects=removed["objects"] + removed["deleted_jobs"],
            checkpoints=removed["checkpoints"],
            trajectories=removed["trajectories"],
            scratch_folders=scratch_folders,
            expired_jobs=removed["expired_jobs"],
            events=removed["events"],
            keys=removed["keys"],
            deliveries=removed["deliveries"],
            complete=not self._unfinished,
        )


def collect(uow: UnitOfWork, store: Store, settings: Settings) -> Collected:
    """Collect everything, without a time limit. Raises StorageError."""
    return Collector(uow, store, settings).run()


def remove_all_leftovers(uow: UnitOfWork, store: Store, settings: Settings) -> int:
    """List the whole storage and remove the leftover objects of all ended stages, also of those collected before.

    Such leftovers exist if an object was written long after the end of its stage.

    Args:
        uow: Opens the views of the database.
        store: The storage.
        settings: Gives the minimum age of the objects.

    Returns:
        Their number.

    Raises:
        StorageError: The storage is unavailable.
    """
    removed = 0
    for page in _pages(store.objects()):
        old, _ = _remove_unreferenced(uow, store, page, settings.collect_after_seconds)
        removed += old
    return removed


class _Checkpoints:
    """Checkpoints of ended stages."""

    def __init__(self, uow: UnitOfWork, store: Store, keep_failed_seconds: float) -> None:
        self._uow = uow
        self._store = store
        self._keep_failed_seconds = keep_failed_seconds

    def batch(self) -> int | None:
        with self._uow.writing() as session:
            keys = collection.forget_checkpoints(session, self._keep_failed_seconds, _CHECKPOINTS)
        for key in keys:
            self._store.remove(key)
        return len(keys) or None


class _Trajectories:
    """Trajectories of ended jobs, unless an unfinished job may read trajectories of that job."""

    def __init__(self, uow: UnitOfWork, store: Store, settings: Settings) -> None:
        self._uow = uow
        self._store = store
        self._keep = settings.keep_trajectories
        self._keep_failed_seconds = settings.collect_after_seconds

        self._sources: dict[str, set[str]] = {}
        """The unfinished jobs that may read trajectories of other jobs, and those jobs."""
        self._job: Position | None = None
        self._last_job = START
        self._last_artifact = ""

    def batch(self) -> int | None:
        if self._keep == "all":
            return None
        if self._finds_new_reader():
            return 0

        # 1. the job
        protected = set().union(*self._sources.values())
        if self._job is None or self._job[1] in protected:
            with self._uow.reading() as session:
                self._job = collection.next_job_to_prune(
                    session, self._keep, self._keep_failed_seconds, self._last_job, protected
                )
            self._last_artifact = ""
            self._last_job = self._job or START
        if self._job is None:
            return None

        # 2. the next page of its artifacts
        job_id = self._job[1]
        with self._uow.reading() as session:
            page = collection.trajectory_page(session, job_id, self._keep, self._last_artifact, _ARTIFACTS)
        if page.last_id is None:
            with self._uow.writing() as session:
                collection.mark_pruned(session, self._job, self._keep)
            self._job = None
            return 0

        # 3. its files of trajectories
        keys = self._forget(job_id, page.files) if page.files else []
        if keys is None:
            self._job = None
            return 0
        if len(keys) == len(page.files):
            self._last_artifact = page.last_id
        for key in keys:
            self._store.remove(key)
        return len(keys)

    def _finds_new_reader(self) -> bool:
        """Look up the sources of an unfinished job that was not known. False if there is none."""
        with self._uow.reading() as session:
            unfinished = collection.unfinished_jobs(session, TRAJECTORY_READERS)
            self._sources = {job_id: self._sources[job_id] for job_id in unfinished & self._sources.keys()}
            new = min(unfinished - self._sources.keys(), default=None)
            if new is not None:
                self._sources[new] = trajectory_sources(session, new)
        return new is not None

    def _forget(self, job_id: str, files: Sequence[TrajectoryFile]) -> list[str] | None:
        """Delete the rows of these files, unless there is a new reader. None if the job runs again."""
        with self._uow.writing() as session:
            if collection.unfinished_jobs(session, TRAJECTORY_READERS) <= self._sources.keys():
                return collection.forget_trajectories(session, job_id, files, _SAMPLES)
        return []


class _Leftovers:
    """Objects without rows of stages that ended long ago. The objects of each stage are listed once."""

    def __init__(self, uow: UnitOfWork, store: Store, min_age_seconds: float) -> None:
        self._uow = uow
        self._store = store
        self._min_age_seconds = min_age_seconds
        self._last = START

    def batch(self) -> int | None:
        # 1. the stages
        with self._uow.reading() as session:
            now = jobs.now(session)
            stages = collection.uncollected_stages(session, now - self._min_age_seconds, self._last, _STAGES)
        if not stages:
            self._last = START
            return None

        # 2. their objects
        removed = 0
        done: list[EndedStage] = []
        try:
            for stage in stages:
                self._last = stage.position  # also if it fails, so that one stage does not block the others
                old, young = self._collect(stage)
                removed += old
                if not young:  # a stage with young objects is listed again
                    done.append(stage)

        # 3. the marks
        finally:
            if done:
                with self._uow.writing() as session:
                    collection.mark_collected(session, done, now)
        return removed

    def _collect(self, stage: EndedStage) -> tuple[int, int]:
        """The number of removed objects of a stage, and that of objects without rows that are too young."""
        removed = 0
        left = 0
        for page in _pages(self._store.objects(stage_folder(stage.job_id, stage.stage_id))):
            old, young = _remove_unreferenced(self._uow, self._store, page, self._min_age_seconds)
            removed += old
            left += young
        return removed, left


class _ExpiredJobs:
    """Jobs that ended longer ago than the settings keep them. They are deleted as by a request: not while in use."""

    def __init__(self, uow: UnitOfWork, settings: Settings) -> None:
        days = {
            JobState.SUCCEEDED: settings.retain_succeeded_days,
            JobState.FAILED: settings.retain_failed_days,
            JobState.CANCELLED: settings.retain_cancelled_days,
        }
        self._uow = uow
        self._days = {state: count for state, count in days.items() if count}
        self._states: deque[JobState] = deque()
        self._last = START

    def batch(self) -> int | None:
        if not self._states:
            self._states.extend(self._days)
            self._last = START
        if not self._states:
            return None

        # 1. the next jobs
        state = self._states[0]
        with self._uow.reading() as session:
            ended_by = jobs.now(session) - self._days[state] * _DAY
            page = deletion.expired(session, state, ended_by, self._last, _JOBS)
            used = deletion.used(session, [job_id for _, job_id in page])
        if not page:
            self._states.popleft()
            self._last = START
            return 0 if self._states else None

        # 2. those that nothing uses, each in a transaction
        self._last = page[-1]
        deleted = 0
        for _, job_id in page:
            if job_id not in used:
                with suppress(NotFoundError, ConflictError):  # it changed meanwhile
                    delete_job(self._uow, job_id, ended_by)
                    deleted += 1
        return deleted


class _Caches:
    """Jobs whose results can be made again, and which use a deleted job. They are deleted with it.

    One that has not ended is cancelled, and deleted after its end.
    """

    def __init__(self, uow: UnitOfWork) -> None:
        self._uow = uow
        self._last = START

    def batch(self) -> int | None:
        with self._uow.reading() as session:
            source = deletion.next_deleted(session, self._last)
            job_ids = [] if source is None else deletion.caches_of(session, source[1], _JOBS)

        deleted = 0
        for job_id in job_ids:
            with suppress(NotFoundError, ConflictError):  # it changed meanwhile, or its last stage is stopping
                self._uow.run(partial(execution.cancel, job_id=job_id), repeatable)
                delete_job(self._uow, job_id)
                deleted += 1
        if deleted < _JOBS:  # otherwise there may be more
            self._last = source or START
        return None if source is None else deleted


class _DeletedJobs:
    """Rows and objects of deleted jobs.

    First all rows but those of the job and its stages, then all objects. Stages and job are kept until no worker can
    still write objects of them, then the objects are listed again. Each batch looks at what is left, so that a removal
    continues after a failure at any point.
    """

    def __init__(self, uow: UnitOfWork, store: Store, keep_seconds: float) -> None:
        self._uow = uow
        self._store = store
        self._keep_seconds = keep_seconds
        self._job: Position | None = None
        self._last = START

    def batch(self) -> int | None:
        if self._job is None:
            with self._uow.reading() as session:
                self._job = deletion.next_to_purge(session, self._last)
            self._last = self._job or START
        if self._job is None:
            return None

        job = self._job
        self._job = None  # if the batch fails, the next one is of another job
        removed = self._purge(job[1])
        if removed is not None:
            self._job = job
        return removed or 0

    def _purge(self, job_id: str) -> int | None:
        """Remove a part of a job. Returns the number of removed objects; None if nothing is left to do now."""
        # 1. its contents
        with self._uow.writing() as session:
            if deletion.forget_contents(session, job_id, _ROWS):
                return 0

        # 2. its objects
        keys = [stored.key for stored in islice(self._store.objects(job_folder(job_id)), _KEYS)]
        for key in keys:
            self._store.remove(key)
        if keys:
            return len(keys)

        # 3. its stages, and the job itself
        with self._uow.writing() as session:
            if not deletion.is_due(session, job_id, self._keep_seconds):
                deletion.postpone(session, job_id, self._keep_seconds)
                return None
            return 0 if deletion.forget_skeleton(session, job_id, _ROWS) else None


class _Aged:
    """Rows that are older than a number of days; 0 keeps them.

    `forget(session, before, limit)` deletes a batch of rows that are older than the time `before`. It returns their
    number, or None if nothing is left to delete.
    """

    def __init__(self, uow: UnitOfWork, days: float, forget: Callable[[Session, float, int], int | None]) -> None:
        self._uow = uow
        self._days = days
        self._forget = forget

    def batch(self) -> int | None:
        if not self._days:
            return None
        with self._uow.writing() as session:
            return self._forget(session, jobs.now(session) - self._days * _DAY, _ROWS)


def _remove_unreferenced(
    uow: UnitOfWork, store: Store, page: Sequence[ListedObject], min_age_seconds: float
) -> tuple[int, int]:
    """Remove the objects of this age that no row references. Returns their number, and that of younger objects."""
    stage_ids = {stored.key: stage_of_key(stored.key) or "" for stored in page}
    with uow.reading() as session:
        keys = collection.unreferenced(session, stage_ids)

    old = [stored.key for stored in page if stored.key in keys and stored.age_seconds >= min_age_seconds]
    for key in old:
        store.remove(key)
    return len(old), len(keys) - len(old)


def _pages(objects: Iterable[ListedObject]) -> Iterator[list[ListedObject]]:
    """Pages of objects. Keys of unknown form are skipped."""
    known = (stored for stored in objects if stage_of_key(stored.key) is not None)
    while page := list(islice(known, _KEYS)):
        yield page
