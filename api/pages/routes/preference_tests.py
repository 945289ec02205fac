"""Routes of the pages of human preference tests: the list, a test, its questions and its results."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import Field

from api.access import require_scope
from api.converters.models import display_name
from api.converters.preference_tests import question_out
from api.deps import CallerDep, ServiceDep
from api.pages.negotiation import PageRoute
from api.pages.pair_views import image_path
from api.pages.queries import FormParameters, filters_of, link, page_links
from api.pages.render import render
from api.routes.jobs import JobListParameters, list_jobs
from api.routes.preference_tests import (
    Number,
    PreferenceResultParameters,
    PreferenceTestListParameters,
    RaterParameters,
    get_preference_results,
    get_preference_test,
    list_preference_tests,
    next_preference_question,
    rater_of,
)
from service import preference_tests
from service.db.queries import jobs, prompt_sets, results
from service.db.queries import preference_tests as rows
from service.states import JobKind, JobState

router = APIRouter(
    prefix="/preference-tests", route_class=PageRoute, include_in_schema=False, dependencies=[require_scope("read")]
)
_EVALUATIONS = 50
"""The newest evaluations that the form for a new test offers."""


class PreferenceTestTableParameters(FormParameters, PreferenceTestListParameters):
    """Filters of the table of preference tests."""


class PreferenceTestParameters(FormParameters, RaterParameters):
    """The rater; with API keys, the name of the key."""


class ResultPageParameters(FormParameters, PreferenceResultParameters):
    """The confidence level of the intervals."""

    confidence: float = Field(0.95, gt=0.5, lt=1)


@router.get("")
def show_preference_tests(
    request: Request, service: ServiceDep, filters: Annotated[PreferenceTestTableParameters, Query()]
) -> Response:
    """Show preference tests, newest first, and the form for a new one."""
    page = list_preference_tests(service, filters)
    chosen = filters_of(filters)
    evaluations = list_jobs(
        service, JobListParameters(kind=[JobKind.EVALUATION], state=[JobState.SUCCEEDED], limit=_EVALUATIONS)
    )
    titles = {job.id: job.label or f"evaluation {job.id[-6:]}" for job in evaluations.data}
    offered = dict.fromkeys(
        [*([filters.evaluation] if filters.evaluation else []), *(job.id for job in evaluations.data)]
    )
    with service.uow.reading() as session:
        titles |= jobs.labels(session, {test.evaluation for test in page.data})
        if filters.evaluation is not None:
            titles |= {filters.evaluation: jobs.label_of(jobs.get(session, filters.evaluation))}
        comparable = jobs.comparable(session, offered)
    return render(
        request,
        "preference-tests.html",
        tests=page.data,
        titles=titles,
        evaluations=[(job_id, titles[job_id]) for job_id in offered if job_id in comparable],
        chosen=chosen,
        **page_links("/preference-tests", chosen, filters.cursor, page.next_cursor),
    )


@router.get("/{test_id}")
def show_preference_test(
    test_id: str,
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    parameters: Annotated[PreferenceTestParameters, Query()],
) -> Response:
    """Show a test, and how many of its questions the rater has answered."""
    test = get_preference_test(test_id, service)
    rater = caller.name or parameters.rater
    with service.uow.reading() as session:
        models = results.models(session, test.models)
        title = jobs.label_of(jobs.get(session, test.evaluation))
        answered = None if rater is None else len(rows.answered_by(session, test.id, rater))
    return render(
        request,
        "preference-test.html",
        test=test,
        title=test.name or title,
        evaluation_title=title,
        models=[(model_id, display_name(models[model_id])) for model_id in test.models],
        rater=rater,
        answered=answered,
        next_url=link(f"/preference-tests/{test.id}/next", _given(caller.name, rater)),
    )


def _given(key_name: str | None, rater: str | None) -> dict[str, str | None]:
    """The parameter with the rater, which a link needs without keys."""
    return {"rater": rater if key_name is None else None}


@router.get("/{test_id}/next")
def show_next_question(
    test_id: str, service: ServiceDep, caller: CallerDep, parameters: Annotated[PreferenceTestParameters, Query()]
) -> Response:
    """Redirect to the rater's next question without an answer, or to the test if all are answered."""
    following = next_preference_question(test_id, service, caller, parameters)
    path = f"/preference-tests/{test_id}"
    if following.question is not None:
        path = f"{path}/questions/{following.question.number}"
    return RedirectResponse(link(path, {}, **_given(caller.name, parameters.rater)), HTTPStatus.SEE_OTHER)


@router.get("/{test_id}/questions/{number}")
def show_question(
    test_id: str,
    number: Number,
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    parameters: Annotated[PreferenceTestParameters, Query()],
) -> Response:
    """Show a question: the images of all models without their names."""
    rater = rater_of(parameters.rater, caller)
    with service.uow.reading() as session:
        test = rows.get(session, test_id)
        asked = preference_tests.ask(session, test, number, rater)
        samples = results.samples(session, asked.samples)
        question = question_out(asked, samples)
        following = preference_tests.next_question(session, test, rater, number)
        first = samples[asked.samples[0]]
        set_id = first.prompt_set_id
        items = [] if set_id is None else prompt_sets.items_of(session, set_id, first.prompt_index)
        title = test.name or jobs.label_of(jobs.get(session, test.job_id))

    path = f"/preference-tests/{test.id}"
    given = _given(caller.name, rater)
    return render(
        request,
        "preference-question.html",
        test=test,
        title=title,
        question=question,
        items=items,
        images=[image_path(image) for image in question.images],
        rater=rater,
        test_url=link(path, {}, **given),
        page_url=link(f"{path}/questions/{number}", {}, **given),
        next_url=None if following is None else link(f"{path}/questions/{following}", {}, **given),
        end_url=link(f"{path}/next", {}, **given),
    )


@router.get("/{test_id}/results")
def show_results(
    test_id: str, request: Request, service: ServiceDep, parameters: Annotated[ResultPageParameters, Query()]
) -> Response:
    """Show the results of a test."""
    test = get_preference_test(test_id, service)
    rates = get_preference_results(test_id, service, parameters)
    names = {rate.model: rate.name for rate in rates.groups[0].models}
    with service.uow.reading() as session:
        title = test.name or jobs.label_of(jobs.get(session, test.evaluation))
    return render(request, "preference-results.html", test=test, title=title, results=rates, names=names)
