"""How much is taken on: queued jobs, and room on the disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from sqlalchemy.orm import Session

from service.db.queries import jobs
from service.errors import LowDiskError, TooManyJobsError
from service.settings import Settings

_MEGABYTE = 1_000_000


def free_disk_bytes(data_dir: Path) -> int:
    """Room on the disk of the data folder."""
    return shutil.disk_usage(data_dir).free


def has_disk_room(settings: Settings) -> bool:
    """Whether there is room enough on the data folder's disk to begin work."""
    return free_disk_bytes(settings.data_dir) >= settings.min_free_disk_mb * _MEGABYTE


def require_room(session: Session, settings: Settings, api_key_id: str | None) -> None:
    """That one more job may be queued. Raises TooManyJobsError or LowDiskError.

    Requests at the same moment do not see each other's jobs, so the limits may be passed by as many.
    """
    if not has_disk_room(settings):
        raise LowDiskError(f"less than {settings.min_free_disk_mb} MB are free on the service's disk")
    queued, of_key = jobs.count_queued(session, api_key_id)
    if queued >= settings.max_queued_jobs:
        raise TooManyJobsError(f"{settings.max_queued_jobs} jobs are queued already")
    most = settings.max_queued_jobs_per_key
    if api_key_id is not None and of_key >= most:
        raise TooManyJobsError(f"{most} jobs of this key are queued already")
