"""Where artifacts' bytes are: a folder of files, or a bucket of an S3 server; both are a `Store`.

An object appears under its key whole or not at all, and is read back and compared before its key is handed out.
The server builds the keys; clients never send a key or a path.
"""

from __future__ import annotations

from service.settings import Settings
from service.storage.base import ListedObject, Store, StoredObject, file_sha256, object_key, stage_of_key
from service.storage.files import FileStore

__all__ = [
    "FileStore",
    "ListedObject",
    "Store",
    "StoredObject",
    "file_sha256",
    "object_key",
    "open_store",
    "stage_of_key",
]


def open_store(settings: Settings) -> Store:
    """The store that the settings name. Raises StartError where an S3 server refuses it."""
    if not settings.s3_endpoint:
        return FileStore(settings.data_dir / "artifacts")
    from service.storage.s3 import S3Store  # here, so that a service on files does not load minio

    return S3Store.open(settings)
