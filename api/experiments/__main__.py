"""`make experiments`: run experiment files on a local embedded service and write their reports.

Jobs and records are kept. A run that was stopped, even by SIGKILL, continues when it is started again.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from rich.console import Console

from api.cli.experiment import records_folder
from api.cli.experiment_live import failure_line, progress
from api.cli.session import ERROR, INTERRUPTED, JOB_FAILED
from api.client import ApiError
from api.experiments.errors import ExperimentError
from api.experiments.format import Experiment
from api.experiments.reporting import report
from api.experiments.runner import Failure, run
from api.local_service import LocalServiceError, local_service


def main() -> int:
    """Run the experiments. Returns 0 if every cell has a record, 3 if a cell failed, 1 for any other error."""
    parser = argparse.ArgumentParser(prog="python -m api.experiments", description=__doc__.split("\n")[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--out", type=Path, help="folder of the records; `records` next to each file if not given")
    parser.add_argument(
        "--data", type=Path, default=Path("dfusion-data/experiments"), help="folder of the service's data (%(default)s)"
    )
    arguments = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the service is stopped
    console = Console(width=None if sys.stdout.isatty() else 160)
    errors = Console(stderr=True)

    try:
        failures = _run_all(arguments, console)
    except (ExperimentError, LocalServiceError, ApiError, OSError) as error:
        errors.print(f"experiments: {error}", style="red", markup=False, highlight=False)
        return ERROR
    except KeyboardInterrupt:
        errors.print("stopped; run the command again to continue", highlight=False)
        return INTERRUPTED

    for failure in failures:
        errors.print(failure_line(failure), style="red", markup=False, highlight=False)
    return JOB_FAILED if failures else 0


def _run_all(arguments: argparse.Namespace, console: Console) -> list[Failure]:
    """Run and report all files. Reads all of them before the first run."""
    experiments = [(Experiment.load(file), records_folder(file, arguments.out)) for file in arguments.files]
    arguments.data.mkdir(parents=True, exist_ok=True)

    failures: list[Failure] = []
    with local_service(arguments.data, arguments.data / "service.log") as client:
        for experiment, out in experiments:
            console.print(f"{experiment.name}: {experiment.description}", markup=False, highlight=False)
            with progress(console) as show:
                result = run(experiment, client, out, show=show)
            failures += result.failures

            if result.done:
                for file in report(experiment, out).files:
                    console.print(str(file), markup=False, highlight=False, soft_wrap=True)
    return failures


if __name__ == "__main__":
    sys.exit(main())
