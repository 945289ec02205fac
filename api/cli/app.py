"""The application: root options and all commands."""

from __future__ import annotations

from typing import Annotated

import typer

from api.cli import (
    api_keys,
    doctor,
    experiment,
    jobs,
    models,
    pairs,
    preference,
    prompt_sets,
    samples,
    submissions,
    webhooks,
    workers,
)
from api.cli.root import RootGroup
from api.cli.session import Session
from api.client import DEFAULT_URL

app = typer.Typer(
    name="dfusion",
    cls=RootGroup,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def root(
    ctx: typer.Context,
    url: Annotated[str, typer.Option(envvar="DFUSION_URL", help="URL of the service")] = DEFAULT_URL,
    api_key: Annotated[
        str | None, typer.Option(envvar="DFUSION_API_KEY", help="API key, if the service requires one")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the API's JSON, and nothing else, on standard output")
    ] = False,
) -> None:
    """D-Fusion: online preference training of text-to-image diffusion models on visually consistent pairs.

    A command line for the service's REST API. These options may stand anywhere on the line.

    Exit codes: 0 success; 1 error; 2 invalid command line; 3 a followed job or a cell failed or was cancelled;
    130 Ctrl-C.

    Examples:
      dfusion doctor
      dfusion round start --prompt-set shapes-attribute-train --rounds 3 --follow
      dfusion jobs list --json
    """
    ctx.obj = Session(url, api_key, as_json)


app.add_typer(submissions.rounds, name="round")
for name, command in submissions.COMMANDS.items():
    app.command(name)(command)
app.add_typer(experiment.app, name="experiment")
app.add_typer(jobs.app, name="jobs")
app.add_typer(pairs.app, name="pairs")
app.add_typer(preference.app, name="preference")
app.add_typer(samples.app, name="samples")
app.add_typer(models.app, name="models")
app.add_typer(prompt_sets.app, name="prompt-sets")
app.add_typer(api_keys.app, name="api-keys")
app.add_typer(webhooks.app, name="webhooks")
app.command("workers")(workers.workers)
app.command("doctor")(doctor.doctor)
