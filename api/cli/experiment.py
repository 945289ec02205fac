"""Commands for experiments: matrices of arms x prompt lists x seeds, described in a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from api.cli.experiment_live import failure_line, progress
from api.cli.screens import listing, styled_state
from api.cli.session import INTERRUPTED, JOB_FAILED, Session

if TYPE_CHECKING:
    from api.experiments import Experiment, Report, RunResult
    from api.experiments.status import CellStatus

app = typer.Typer(no_args_is_help=True, help="Experiments: run a matrix of trainings, show its status, report it.")
File = Annotated[Path, typer.Argument(metavar="FILE", help="The experiment in YAML; see docs/experiments.md")]
Out = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder of the records; `records` next to FILE if not given")
]
Arms = Annotated[list[str] | None, typer.Option("--arm", help="Only this arm, or `base`; can be repeated")]
Lists = Annotated[list[str] | None, typer.Option("--list", help="Only this prompt list; can be repeated")]
Seeds = Annotated[list[int] | None, typer.Option("--seed", help="Only this seed; can be repeated")]


@app.command()
def run(
    ctx: typer.Context,
    file: File,
    out: Out = None,
    arm: Arms = None,
    list_name: Lists = None,
    seed: Seeds = None,
    parallel: Annotated[
        int | None, typer.Option(min=1, help="Cells that run at once; the number of workers if not given")
    ] = None,
) -> None:
    """Run the cells that have no record yet, and follow them. Ctrl-C does not stop their jobs.

    Run the command again, on any machine, to continue. It follows existing jobs, skips finished cells and retries
    failed ones. Exit code 3 if a cell failed.

    Examples:
      dfusion experiment run experiments/shapes-dpo.yaml
      dfusion experiment run experiments/shapes-dpo.yaml --arm naive --arm fused --seed 1
    """
    from api.experiments import Experiment, Selection
    from api.experiments import run as run_experiment

    session: Session = ctx.obj
    experiment = Experiment.load(file)
    folder = records_folder(file, out)
    selection = Selection(tuple(list_name or ()), tuple(arm or ()), tuple(seed or ()))
    console = session.err if session.as_json else session.out

    try:
        with session.client() as client, progress(console) as show:
            result = run_experiment(experiment, client, folder, selection=selection, parallel=parallel, show=show)
    except KeyboardInterrupt:
        session.err.print(f"the jobs continue; to follow them: dfusion experiment run {file}", highlight=False)
        raise typer.Exit(INTERRUPTED) from None

    session.show(_json(experiment, folder, result), lambda: _screen(experiment, folder, result))
    if result.failures:
        raise typer.Exit(JOB_FAILED)


@app.command()
def report(
    ctx: typer.Context,
    file: File,
    out: Out = None,
    plots: Annotated[bool, typer.Option(help="Draw plots; requires matplotlib")] = True,
) -> None:
    """Write report.json, report.md and plots next to the records. Needs only the records, no service.

    Example: dfusion experiment report experiments/shapes-dpo.yaml
    """
    from api.experiments import Experiment
    from api.experiments.reporting import as_json, report

    session: Session = ctx.obj
    result = report(Experiment.load(file), records_folder(file, out), plots=plots)
    session.show(as_json(result), lambda: _report_screen(result))


def _report_screen(result: Report) -> RenderableType:
    lines = [Text(f"{len(result.records)} records")]
    if result.missing:
        lines.append(Text(f"missing: {', '.join(cell.name for cell in result.missing)}", style="yellow"))
    return Group(*lines, *(Text(str(path), overflow="fold") for path in result.files))


@app.command()
def status(
    ctx: typer.Context, file: File, out: Out = None, arm: Arms = None, list_name: Lists = None, seed: Seeds = None
) -> None:
    """Show the cells, their records and their jobs. Starts nothing.

    Example: dfusion experiment status experiments/shapes-dpo.yaml
    """
    from api.experiments import Experiment, Selection
    from api.experiments.status import status as status_of

    session: Session = ctx.obj
    selection = Selection(tuple(list_name or ()), tuple(arm or ()), tuple(seed or ()))
    with session.client() as client:
        cells = status_of(Experiment.load(file), client, records_folder(file, out), selection=selection)
    session.show({"data": [_status_json(cell_status) for cell_status in cells]}, lambda: _status_screen(cells))


def _status_json(cell_status: CellStatus) -> dict[str, object]:
    return {
        "list": cell_status.cell.list_name,
        "arm": cell_status.cell.arm,
        "seed": cell_status.cell.seed,
        "key": cell_status.cell.settings.key,
        "state": cell_status.state,
        "record": None if cell_status.record is None else str(cell_status.record),
        "job": None if cell_status.job is None else cell_status.job.model_dump(mode="json"),
    }


def _status_screen(cells: Sequence[CellStatus]) -> RenderableType:
    rows = []
    for cell_status in cells:
        job = cell_status.job
        job_progress = "" if job is None else f"{job.kind} {job.progress.percent:.0f} %"
        error = "" if job is None or job.error is None else f"{job.error.code}: {job.error.message}"
        job_id = "" if job is None else job.id
        rows.append((cell_status.cell.name, styled_state(cell_status.state), job_progress, job_id, error))
    return listing(("cell", "state", "job", "", ""), rows)


def records_folder(file: Path, out: Path | None) -> Path:
    """The folder of all experiments' records: `out`, or `records` next to the file."""
    return file.parent / "records" if out is None else out


def _json(experiment: Experiment, out: Path, result: RunResult) -> dict[str, object]:
    from api.experiments.records import folder_of

    folder = folder_of(out, experiment.name)
    return {
        "experiment": experiment.name,
        "records": [str(folder / cell.file_name) for cell in result.done],
        "recorded_before": result.recorded_before,
        "failures": [
            {"cell": failure.cell.name, "job": failure.job, "message": failure.message} for failure in result.failures
        ],
    }


def _screen(experiment: Experiment, out: Path, result: RunResult) -> RenderableType:
    from api.experiments.records import folder_of

    before = f", {result.recorded_before} of them from earlier runs" if result.recorded_before else ""
    lines = [Text(f"{len(result.done)} cells have records in {folder_of(out, experiment.name)}{before}")]
    lines += [Text(failure_line(failure), style="red") for failure in result.failures]
    if result.failures:
        lines.append(Text("run the command again to retry the failed cells"))
    return Group(*lines)
