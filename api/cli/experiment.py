"""Experiments: matrices of arms x prompt lists x seeds, described in a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from api.cli.experiment_live import failure_line, progress
from api.cli.screens import listing, styled_state
from api.cli.session import INTERRUPTED, JOB_FAILED, Session
from api.experiments.cells import Selection
from api.experiments.format import Experiment
from api.experiments.records import folder_of
from api.experiments.reporting import Report
from api.experiments.reporting import as_json as report_json
from api.experiments.reporting import report as write_report
from api.experiments.runner import RunResult
from api.experiments.runner import run as run_experiment
from api.experiments.status import CellStatus
from api.experiments.status import status as status_of

app = typer.Typer(no_args_is_help=True, help="Experiments: run a matrix of trainings, see how far it is, report it.")
File = Annotated[Path, typer.Argument(metavar="FILE", help="The experiment, as YAML; docs/experiments.md")]
Out = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder of the records; `records` beside FILE if not given")
]
Arms = Annotated[list[str] | None, typer.Option("--arm", help="Only this arm, or `base`; may be repeated")]
Lists = Annotated[list[str] | None, typer.Option("--list", help="Only this prompt list; may be repeated")]
Seeds = Annotated[list[int] | None, typer.Option("--seed", help="Only this seed; may be repeated")]


@app.command()
def run(
    ctx: typer.Context,
    file: File,
    out: Out = None,
    arm: Arms = None,
    list_name: Lists = None,
    seed: Seeds = None,
    parallel: Annotated[
        int | None, typer.Option(min=1, help="Cells under way at once; as many as there are workers if not given")
    ] = None,
) -> None:
    """Run the cells that have no record yet, and follow them. Ctrl-C leaves their jobs alone.

    Run it again to continue, on any machine: jobs that exist are found, finished cells are skipped, failed ones are
    retried. Exit code 3 if a cell failed.

    Examples:
      dfusion experiment run experiments/shapes-dpo.yaml
      dfusion experiment run experiments/shapes-dpo.yaml --arm naive --arm fused --seed 1
    """
    session: Session = ctx.obj
    experiment = Experiment.load(file)
    folder = out_of(file, out)
    selection = Selection(tuple(list_name or ()), tuple(arm or ()), tuple(seed or ()))
    console = session.err if session.as_json else session.out
    try:
        with session.client() as client, progress(console) as show:
            result = run_experiment(experiment, client, folder, selection=selection, parallel=parallel, show=show)
    except KeyboardInterrupt:
        session.err.print(
            f"its jobs continue; run it again to follow them: dfusion experiment run {file}", highlight=False
        )
        raise typer.Exit(INTERRUPTED) from None
    session.answer(_json(experiment, folder, result), lambda: _screen(experiment, folder, result))
    if result.failures:
        raise typer.Exit(JOB_FAILED)


@app.command()
def report(
    ctx: typer.Context,
    file: File,
    out: Out = None,
    plots: Annotated[bool, typer.Option(help="Draw plots, which takes matplotlib")] = True,
) -> None:
    """Write report.json, report.md and plots beside the records. It takes the records alone, no service.

    Example: dfusion experiment report experiments/shapes-dpo.yaml
    """
    session: Session = ctx.obj
    result = write_report(Experiment.load(file), out_of(file, out), plots=plots)
    session.answer(report_json(result), lambda: _written(result))


def _written(result: Report) -> RenderableType:
    lines = [Text(f"{len(result.records)} records")]
    if result.missing:
        lines.append(Text(f"missing: {', '.join(cell.name for cell in result.missing)}", style="yellow"))
    return Group(*lines, *(Text(str(path), overflow="fold") for path in result.files))


@app.command()
def status(
    ctx: typer.Context, file: File, out: Out = None, arm: Arms = None, list_name: Lists = None, seed: Seeds = None
) -> None:
    """The cells, their records and their jobs. Starts nothing.

    Example: dfusion experiment status experiments/shapes-dpo.yaml
    """
    session: Session = ctx.obj
    selection = Selection(tuple(list_name or ()), tuple(arm or ()), tuple(seed or ()))
    with session.client() as client:
        cells = status_of(Experiment.load(file), client, out_of(file, out), selection=selection)
    session.answer({"data": [_status_json(one) for one in cells]}, lambda: _status_screen(cells))


def _status_json(one: CellStatus) -> dict[str, object]:
    return {
        "list": one.cell.list_name,
        "arm": one.cell.arm,
        "seed": one.cell.seed,
        "key": one.cell.settings.key,
        "state": one.state,
        "record": None if one.record is None else str(one.record),
        "job": None if one.job is None else one.job.model_dump(mode="json"),
    }


def _status_screen(cells: Sequence[CellStatus]) -> RenderableType:
    rows = []
    for one in cells:
        job = one.job
        where = "" if job is None else f"{job.kind} {job.progress.percent:.0f} %"
        error = "" if job is None or job.error is None else f"{job.error.code}: {job.error.message}"
        rows.append((one.cell.name, styled_state(one.state), where, "" if job is None else job.id, error))
    return listing(("cell", "state", "job", "", ""), rows)


def out_of(file: Path, out: Path | None) -> Path:
    """Where the records of all experiments are."""
    return file.parent / "records" if out is None else out


def _json(experiment: Experiment, out: Path, result: RunResult) -> dict[str, object]:
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
    before = f", {result.recorded_before} of them before" if result.recorded_before else ""
    lines = [Text(f"{len(result.done)} cells are recorded in {folder_of(out, experiment.name)}{before}")]
    lines += [Text(failure_line(failure), style="red") for failure in result.failures]
    if result.failures:
        lines.append(Text("run it again to retry what failed"))
    return Group(*lines)
