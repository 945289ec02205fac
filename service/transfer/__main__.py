"""Move a project between installations, with any database and storage.

    python -m service.transfer export DIR_OR_FILE [--job ID …]
    python -m service.transfer import FILE

The settings (DFUSION_…) select the installation, as for the service.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sqlalchemy.exc import DBAPIError

from service.errors import ServiceError
from service.file_lock import file_lock
from service.service import Service
from service.settings import Settings
from service.transfer.exporting import export_project
from service.transfer.importing import import_project

_FILE_NAME = "dfusion-export.tar"


def main(arguments: Sequence[str] | None = None, settings: Settings | None = None) -> None:
    """Run the command line. Exits with a message and status 1 on failure."""
    options = _parser().parse_args(arguments)
    settings = settings or Settings.or_exit()
    try:
        lines = _export(settings, options) if options.command == "export" else _import(settings, options)
        sys.stdout.write("".join(f"{line}\n" for line in lines))
    except DBAPIError as error:
        sys.exit(f"cannot {options.command}: {error.orig}")
    except (ServiceError, OSError) as error:
        sys.exit(f"cannot {options.command}: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m service.transfer", description="Move a project between installations."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write rows and artifacts into one file")
    export.add_argument("path", type=Path, help=f"the file, or a folder for {_FILE_NAME}")
    export.add_argument("--job", action="append", default=[], metavar="ID", help="only this job and its sources")
    commands.add_parser("import", help="import an exported file").add_argument("path", type=Path, help="the file")
    return parser


def _export(settings: Settings, options: argparse.Namespace) -> list[str]:
    path = options.path / _FILE_NAME if options.path.is_dir() else options.path
    with _open(settings) as service:
        export = export_project(service, path, options.job)

    contents = f"{export.jobs} jobs, {export.rows} rows, {export.objects} objects, {export.object_bytes} bytes"
    unfinished = [f"{job_id} has not ended: it will be imported as cancelled" for job_id in export.unfinished]
    return [f"{export.path}: {contents}", *unfinished]


def _import(settings: Settings, options: argparse.Namespace) -> list[str]:
    with ExitStack() as stack:
        if settings.database.startswith("sqlite"):  # the long transaction would block the worker of a running service
            stack.enter_context(file_lock(settings.data_dir / "service.lock"))
        result = import_project(stack.enter_context(_open(settings)), options.path)

    new = f"{result.jobs} jobs, {result.rows} rows and {result.objects} objects are new"
    cancelled = [f"{job_id} had not ended: it was imported as cancelled" for job_id in result.cancelled]
    return [f"{result.path}: {new}, {result.rows_present} rows existed", *cancelled]


@contextmanager
def _open(settings: Settings) -> Iterator[Service]:
    service = Service.open(settings)
    try:
        yield service
    finally:
        service.close()


if __name__ == "__main__":
    main()
