"""An earlier version of the project to compare with."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def checkout_of(revision: str) -> Iterator[Path]:
    """A temporary checkout of a revision of git. SIGTERM ends the process such that the checkout is removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    git = ("git", "-C", str(ROOT), "worktree")
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "before"
        subprocess.run((*git, "add", "--quiet", "--detach", str(checkout), revision), check=True)
        try:
            yield checkout
        finally:
            subprocess.run((*git, "remove", "--force", str(checkout)), check=True)
