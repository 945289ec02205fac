"""Move a project between installations, whatever their databases and storages.

    python -m service.transfer export DIR_OR_FILE [--job ID …]
    python -m service.transfer import FILE

The installation is that of the settings (DFUSION_…), as for the service.
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
    """Do as the command line says; ends with a message and exit code 1 where that cannot be."""
    wanted = _parser().parse_args(arguments)
    settings = settings or Settings.or_exit()
    try:
        lines = _export(settings, wanted) if wanted.command == "export" else _import(settings, wanted)
        sys.stdout.write("".join(f"{line}\n" for line in lines))
    except ServiceError as error:
        sys.exit(f"cannot {wanted.command}: {error}")
    except DBAPIError as error:
        sys.exit(f"cannot {wanted.command}: {error.orig}")
    except OSError as error:
        sys.exit(f"cannot {wanted.command}: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m service.transfer", description="Move a project between installations."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write rows and artifacts into one file")
    export.add_argument("path", type=Path, help=f"the file, or a folder for {_FILE_NAME}")
    export.add_argument("--job", action="append", default=[], metavar="ID", help="only this job and its sources")
    commands.add_parser("import", help="take in what a file holds").add_argument("path", type=Path, help="the file")
    return parser


def _export(settings: Settings, wanted: argparse.Namespace) -> list[str]:
    path = wanted.path / _FILE_NAME if wanted.path.is_dir() else wanted.path
    with _opened(settings) as service:
        done = export_project(service, path, wanted.job)
    lines = [f"{done.path}: {done.jobs} jobs, {done.rows} rows, {done.objects} objects, {done.object_bytes} bytes"]
    return lines + [f"{job_id} has not ended: it will be imported as cancelled" for job_id in done.unfinished]


def _import(settings: Settings, wanted: argparse.Namespace) -> list[str]:
    with ExitStack() as stack:
        if settings.database.startswith("sqlite"):  # a long transaction would keep the service's worker from its own
            stack.enter_context(file_lock(settings.data_dir / "service.lock"))
        done = import_project(stack.enter_context(_opened(settings)), wanted.path)
    lines = [
        f"{done.path}: {done.jobs} jobs, {done.rows} rows and {done.objects} objects are new, "
        f"{done.rows_present} rows were here"
    ]
    return lines + [f"{job_id} had not ended: it is cancelled here" for job_id in done.cancelled]


@contextmanager
def _opened(settings: Settings) -> Iterator[Service]:
    service = Service.open(settings)
    try:
        yield service
    finally:
        service.close()


if __name__ == "__main__":
    main()
