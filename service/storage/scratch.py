"""Local folders for unfinished files. A lock file in each folder shows whether its process still runs."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from service.errors import AlreadyRunningError
from service.file_lock import file_lock

_PREFIX = ".scratch-"
_LOCK = "lock"


@contextmanager
def scratch_folder(root: Path) -> Iterator[Path]:
    """An empty folder under `root`. It is removed at the end of the block."""
    with ExitStack() as stack:
        folder = None
        while folder is None:
            folder = _create(root, stack)
        yield folder


def _create(root: Path, stack: ExitStack) -> Path | None:
    """A new folder, locked until the stack closes. None if a collection removed it before it was locked."""
    outer = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
    stack.callback(shutil.rmtree, outer, ignore_errors=True)
    try:
        stack.enter_context(file_lock(outer / _LOCK))
        (outer / "files").mkdir()
    except (FileNotFoundError, AlreadyRunningError):
        return None
    return outer / "files"


def remove_dead(root: Path, older_than_seconds: float) -> int:
    """Remove the folders under `root` of this age whose processes have ended. Returns their number."""
    count = 0
    for folder in root.glob(f"{_PREFIX}*"):
        try:
            if time.time() - folder.stat().st_mtime < older_than_seconds:
                continue
            with file_lock(folder / _LOCK):
                shutil.rmtree(folder, ignore_errors=True)
        except (FileNotFoundError, AlreadyRunningError):  # removed meanwhile, or in use
            continue
        count += 1
    return count
