"""Stores for the bytes of artifacts: a folder of files, or a bucket of an S3 server.

An object appears under its key completely or not at all, and `put` verifies it by reading it back. The service builds
the keys; clients never send a key or a path.
"""

from __future__ import annotations

from service.settings import Settings
from service.storage.base import (
    ListedObject,
    Store,
    StoredObject,
    file_sha256,
    job_folder,
    object_key,
    stage_folder,
    stage_of_key,
)
from service.storage.files import FileStore

__all__ = [
    "FileStore",
    "ListedObject",
    "Store",
    "StoredObject",
    "file_sha256",
    "job_folder",
    "object_key",
    "open_store",
    "stage_folder",
    "stage_of_key",
]


def open_store(settings: Settings) -> Store:
    """The store of the settings. Raises StartError if the S3 server denies access to the bucket."""
    if not settings.s3_endpoint:
        return FileStore(settings.data_dir / "artifacts")

    from service.storage.s3 import S3Store  # here, so that a service with files does not load minio

    return S3Store.open(settings)
