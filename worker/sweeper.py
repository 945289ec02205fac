"""`python -m worker.sweeper`: recovers lost leases, hints and workers, and collects what is no longer needed.

Any number of sweepers can run; one sweeps and one collects at a time. Does not import torch.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading

from service import logs
from service.broker import open_queue
from service.db.unit_of_work import SWEEPER_POOL
from service.errors import StartError
from service.jobs.collector import remove_all_leftovers
from service.maintenance import maintain
from service.service import Service
from service.settings import Settings
from worker.watchdog import touch

_logger = logging.getLogger(__name__)


def main() -> None:
    """Sweep and collect until stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--all-leftovers",
        action="store_true",
        help="instead, list the whole storage once, remove the leftovers of all ended stages, and exit",
    )
    arguments = parser.parse_args()
    settings = Settings.or_exit()
    logs.configure(settings)
    stop = threading.Event()
    if not arguments.all_leftovers:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())

    try:
        service = Service.open(settings, open_queue(settings), migrates=False, pool=SWEEPER_POOL)
    except StartError as error:
        sys.exit(f"cannot start: {error}")
    try:
        if arguments.all_leftovers:
            _logger.info("removed %d leftover objects", remove_all_leftovers(service.uow, service.store, settings))
        else:
            maintain(service, stop, after_sweep=lambda: touch(settings))
    finally:
        service.close()


if __name__ == "__main__":
    main()
