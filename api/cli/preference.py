"""Commands for human preference tests. Raters answer in the browser."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from api.cli.options import Limit, fetch_pages
from api.cli.screens import listing, local_time, sheet
from api.cli.session import Session

if TYPE_CHECKING:
    from api.wire.preference_tests import PreferenceRatesOut, PreferenceResultsOut, PreferenceTestOut

app = typer.Typer(no_args_is_help=True, help="Human preference tests: create, list, results, answers, delete.")
TestId = Annotated[str, typer.Argument(metavar="TEST", help="The preference test's id, prf_…")]


@app.command()
def create(
    ctx: typer.Context,
    evaluation: Annotated[str, typer.Argument(metavar="EVALUATION", help="An evaluation job that has succeeded")],
    name: Annotated[str | None, typer.Option(help="Display name")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Id, name or alias of one of its models; can be repeated, for 2 to 8 models. Default: all"),
    ] = None,
    prompt_set: Annotated[
        list[str] | None, typer.Option(help="One of its prompt sets; can be repeated. Default: all")
    ] = None,
    questions: Annotated[
        int | None, typer.Option(help="Number of questions, drawn at random. Default: all prompts and seeds")
    ] = None,
) -> None:
    """Create a test from the images of an evaluation, and show the address for its raters.

    Example: dfusion preference create job_… --name "figure 6" --questions 100
    """
    session: Session = ctx.obj
    with session.client() as client:
        test = client.create_preference_test(
            evaluation, name=name, models=model, prompt_sets=prompt_set, questions=questions
        )
        address = f"{client.base_url}/preference-tests/{test.id}"
    session.show(test, lambda: sheet(_fields(test) | {"raters": address}))


@app.command("list")
def list_tests(
    ctx: typer.Context,
    evaluation: Annotated[str | None, typer.Option(metavar="JOB", help="Only those of this evaluation")] = None,
    limit: Limit = 50,
) -> None:
    """List preference tests, newest first."""
    session: Session = ctx.obj
    with session.client() as client:
        page = fetch_pages(lambda size, cursor: client.preference_tests_page(evaluation, size, cursor), limit)

    rows = (
        (test.id, test.name or "-", len(test.models), test.questions, test.answers, local_time(test.created_at))
        for test in page.data
    )
    headings = ("test", "name", "models>", "questions>", "answers>", "created")
    session.show(page, lambda: listing(headings, rows, page.has_more))


@app.command()
def results(
    ctx: typer.Context,
    test: TestId,
    confidence: Annotated[float, typer.Option(help="Confidence level of the intervals")] = 0.95,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV")] = False,
) -> None:
    """Show how often each model was chosen, with Wilson intervals, overall and by prompt set.

    Example: dfusion preference results prf_… --confidence 0.9
    """
    session: Session = ctx.obj
    with session.client() as client:
        if csv:
            typer.echo(client.preference_results_csv(test, confidence=confidence), nl=False)
        else:
            rates = client.preference_results(test, confidence=confidence)
            session.show(rates, lambda: _results(rates))


@app.command()
def answers(ctx: typer.Context, test: TestId) -> None:
    """Print all answers as CSV, a line each: rater, prompt, seed, order of the models, and the model chosen."""
    session: Session = ctx.obj
    with session.client() as client:
        typer.echo(client.preference_answers_csv(test), nl=False)


@app.command()
def delete(ctx: typer.Context, test: TestId) -> None:
    """Delete a preference test with all its answers."""
    session: Session = ctx.obj
    with session.client() as client:
        client.delete_preference_test(test)
    session.show(None, lambda: Text(f"{test} is deleted"))


def _fields(test: PreferenceTestOut) -> dict[str, object]:
    return {
        "test": test.id,
        "name": test.name,
        "evaluation": test.evaluation,
        "models": len(test.models),
        "questions": test.questions,
    }


def _results(rates: PreferenceResultsOut) -> RenderableType:
    fields = {"test": rates.test, "raters": rates.raters, "answers": rates.answers, "questions": rates.questions}
    parts: list[RenderableType] = [sheet(fields)]
    for group in rates.groups:
        parts += [Text(), Text(group.prompt_set or "all answers", style="bold"), _rates(group, rates.confidence)]
    return Group(*parts)


def _rates(group: PreferenceRatesOut, confidence: float) -> RenderableType:
    rows = [
        (rate.name, rate.model, rate.count, _percent(rate.share), _interval(rate.interval)) for rate in group.models
    ]
    rows.append(("none", "", group.none.count, _percent(group.none.share), _interval(group.none.interval)))
    return listing(("model", "id", "chosen>", "share>", f"{confidence:.0%} interval>"), rows)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _interval(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.1%} to {interval[1]:.1%}"
