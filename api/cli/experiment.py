"""Experiments: matrices of arms x prompt lists x seeds, described in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from api.cli.experiment_live import failure_line, progress
from api.cli.session import INTERRUPTED, JOB_FAILED, Session
from api.experiments.cells import Selection
from api.experiments.format import Experiment
from api.experiments.records import folder_of
from api.experiments.runner import RunResult
from api.experiments.runner import run as run_experiment

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
