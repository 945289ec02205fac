"""`python -m worker.health`: exit code 0 if the health file was renewed recently. For containers.

It works without the broker.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from service.settings import Settings

_MISSED_RENEWALS = 6


def is_healthy(settings: Settings) -> bool:
    """Whether the worker or sweeper has renewed its health file recently."""
    interval_seconds = max(settings.presence_seconds, settings.sweep_seconds)
    try:
        age_seconds = time.time() - Path(settings.health_file).stat().st_mtime
    except OSError:
        return False
    return age_seconds < _MISSED_RENEWALS * interval_seconds


if __name__ == "__main__":
    sys.exit(0 if is_healthy(Settings.or_exit()) else 1)
