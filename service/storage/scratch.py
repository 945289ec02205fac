"""Local folders for unfinished files. Their process holds a lock, so that those of dead processes can be removed."""

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
    """An empty folder under `root`; removed at the end."""
    with ExitStack() as stack:
        folder = None
        while folder is None:
            folder = _made(root, stack)
        yield folder


def _made(root: Path, stack: ExitStack) -> Path | None:
    """A new folder, locked until the stack ends; None where somebody took it for a dead one before it was locked."""
    outer = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
    stack.callback(shutil.rmtree, outer, ignore_errors=True)
    try:
        stack.enter_context(file_lock(outer / _LOCK))
        (outer / "files").mkdir()
    except (FileNotFoundError, AlreadyRunningError):
        return None
    return outer / "files"


def remove_dead(root: Path, older_than_seconds: float) -> int:
    """Remove the folders under `root` that old which no process holds; how many there were."""
    count = 0
    for folder in root.glob(f"{_PREFIX}*"):
        try:
            if time.time() - folder.stat().st_mtime < older_than_seconds:
                continue
            with file_lock(folder / _LOCK):
                shutil.rmtree(folder, ignore_errors=True)
        except (FileNotFoundError, AlreadyRunningError):  # it was removed just now, or is in use
            continue
        count += 1
    return count
