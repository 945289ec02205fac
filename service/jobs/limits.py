"""Limits on queued jobs and free disk space."""

from __future__ import annotations

import shutil
from pathlib import Path

from sqlalchemy.orm import Session

from service.db.queries import jobs
from service.errors import LowDiskError, TooManyJobsError
from service.settings import Settings

_MEGABYTE = 1_000_000


def free_disk_bytes(data_dir: Path) -> int:
    """Free space on the disk of the data folder."""
    return shutil.disk_usage(data_dir).free


def has_disk_room(settings: Settings) -> bool:
    """Whether the disk of the data folder has enough free space to start work."""
    return free_disk_bytes(settings.data_dir) >= settings.min_free_disk_mb * _MEGABYTE


def require_capacity(session: Session, settings: Settings, api_key_id: str | None) -> None:
    """Check that one more job can be queued.

    Concurrent requests do not see each other's jobs, so together they can exceed the limits.

    Raises:
        LowDiskError: The disk has less than the required free space.
        TooManyJobsError: Too many jobs are queued, in total or with this API key.
    """
    if not has_disk_room(settings):
        raise LowDiskError(f"the disk of the service has less than {settings.min_free_disk_mb} MB of free space")

    queued, queued_with_key = jobs.count_queued(session, api_key_id)
    if queued >= settings.max_queued_jobs:
        raise TooManyJobsError(f"the limit of {settings.max_queued_jobs} queued jobs is reached")
    if api_key_id is not None and queued_with_key >= settings.max_queued_jobs_per_key:
        raise TooManyJobsError(f"the limit of {settings.max_queued_jobs_per_key} queued jobs per API key is reached")
