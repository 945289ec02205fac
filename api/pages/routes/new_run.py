"""Routes of the form that starts a run, from the paper's defaults or from the settings of another run."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import Field, ValidationError
from sqlalchemy.orm import Session

from api.access import NEW_RUN_PATH, require_scope
from api.body import BYTES_PER_VALUE, json_error
from api.converters.estimates import estimate_out
from api.deps import CallerDep, Parameters, ServiceDep
from api.errors import field_problems, status_of
from api.pages.form_body import read_form, require_token
from api.pages.negotiation import PageRoute
from api.pages.queries import FormParameters
from api.pages.render import render
from api.pages.run_form import EVERYDAY, Problems, fields, groups, problems_of, request_of, texts_of
from api.wire.estimates import EstimateOut
from service.db.queries import jobs, prompt_sets, results
from service.db.tables import Job
from service.errors import IdempotencyError, InvalidRequestError, NotFoundError, ServiceError
from service.jobs.kinds import RoundSpec, spec_of
from service.jobs.kinds.rounds import EXAMPLE
from service.service import Service, create_job, estimate_job
from service.states import JobKind

router = APIRouter(route_class=PageRoute, include_in_schema=False, dependencies=[require_scope("submit")])
_SETS = 200
_MODELS = 50
"""The prompt sets and the trained models that the form suggests."""
_MOST_PROMPTS = 200
"""A clone of a run with more inline prompts names the stored set."""
_NO_PROBLEMS = Problems({})
_KEY = re.compile(r"[\x21-\x7e]{1,255}")


class NewRunParameters(FormParameters, Parameters):
    """`clone`: the run whose settings fill the form. `preset`: the preset whose values do."""

    clone: str | None = Field(None, max_length=100)
    preset: Literal["paper", "released_code"] | None = None


@dataclass(frozen=True)
class _Start:
    """What the form started from.

    Attributes:
        form: The form at its start, with which changes are compared.
        clone: The run whose settings it has.
        preset: The preset whose values it has.
    """

    form: Mapping[str, str]
    clone: Job | None = None
    preset: str | None = None


@dataclass(frozen=True)
class _Answer:
    """The answer of the service to a form.

    Attributes:
        status: The HTTP status.
        estimate: The cost of the run, if only that was asked for.
        problems: Why there is no run or estimate.
        job_id: The new run.
        key_is_used: Whether the key of the form has started another run.
    """

    status: int = HTTPStatus.OK
    estimate: EstimateOut | None = None
    problems: Problems = _NO_PROBLEMS
    job_id: str | None = None
    key_is_used: bool = False


@router.get(NEW_RUN_PATH)
def show_form(request: Request, service: ServiceDep, parameters: Annotated[NewRunParameters, Query()]) -> Response:
    """Show the form with the paper's defaults, with those of the released code, or with the settings of a run."""
    start = _start(service, parameters)
    body = request_of(start.form)
    return _page(request, service, start, start.form, _answer(body, lambda spec: _estimated(service, spec)))


async def _form(request: Request) -> dict[str, str]:
    form = await read_form(request)
    require_token(request, form)
    return form


@router.post(NEW_RUN_PATH)
def send_form(
    request: Request, service: ServiceDep, caller: CallerDep, form: Annotated[dict[str, str], Depends(_form)]
) -> Response:
    """Start the run, or estimate its cost. The page of a form with problems has everything that was entered."""
    parameters = _parameters_of(form)
    body = request_of(form)
    malformed = json_error(json.dumps(body).encode(), service.settings.max_body_bytes // BYTES_PER_VALUE)
    if malformed is not None:
        return malformed

    # 1. the run or its estimate
    given_key = form.get("key", "")
    key = given_key if _KEY.fullmatch(given_key) else secrets.token_urlsafe(16)
    if form.get("intent") == "estimate":
        answer = replace(_answer(body, lambda spec: _estimated(service, spec)), status=HTTPStatus.OK)
    else:
        answer = _answer(body, lambda spec: _Answer(job_id=create_job(service, spec, key, caller.key_id)))
    if answer.job_id is not None:
        return RedirectResponse(f"/jobs/{answer.job_id}", HTTPStatus.SEE_OTHER)

    # 2. the page again
    start = _start(service, parameters)
    shown = dict(start.form) | {name: form[name] for name in fields() if name in form}
    return _page(request, service, start, shown, answer, None if answer.key_is_used else key)


def _parameters_of(form: Mapping[str, str]) -> NewRunParameters:
    """What the form started from. Raises InvalidRequestError for values that no page has."""
    given = {name: form[name] for name in NewRunParameters.model_fields if name in form}
    try:
        return NewRunParameters.model_validate(given)
    except ValidationError as error:
        problems = field_problems(error, given)
        raise InvalidRequestError(problems[0].message, *problems) from error


def _answer(body: Mapping[str, Any], use: Callable[[RoundSpec], _Answer]) -> _Answer:
    """The answer of `use` to the request, or the problems of the request."""
    try:
        return use(RoundSpec.model_validate(body))
    except ValidationError as error:
        problems = problems_of(field_problems(error, body))
        return _Answer(HTTPStatus.UNPROCESSABLE_ENTITY, problems=problems)
    except IdempotencyError as error:
        message = "This form has started a run with other settings. Start again to start another run."
        return _Answer(status_of(error), problems=Problems({}, (message,)), key_is_used=True)
    except InvalidRequestError as error:
        problems = problems_of(error.problems) or Problems({}, (str(error),))
        return _Answer(status_of(error), problems=problems)
    except ServiceError as error:
        return _Answer(status_of(error), problems=Problems({}, (str(error),)))


def _estimated(service: Service, spec: RoundSpec) -> _Answer:
    return _Answer(estimate=estimate_out(*estimate_job(service, spec), spec))


def _start(service: Service, parameters: NewRunParameters) -> _Start:
    if parameters.clone is None:
        preset = parameters.preset or "paper"
        named = {name: EXAMPLE[name] for name in ("prompt_set", "held_out_prompt_set")}
        spec = RoundSpec.model_validate(named | {"preset": preset})
        return _Start(texts_of(spec.model_dump(mode="json")), preset=preset)

    with service.uow.reading() as session:
        job = jobs.get(session, parameters.clone)
        if job.kind != JobKind.ROUND:
            raise NotFoundError(f"expected a run with rounds, got {job.id}, which is a {job.kind}")
        return _Start(texts_of(_request_of_job(session, job)), clone=job)


def _request_of_job(session: Session, job: Job) -> dict[str, Any]:
    """The request of the job, with the ids of prompt sets whose names have a newer version since."""
    request = spec_of(job.kind, job.spec).model_dump(mode="json")  # with the defaults of newer settings
    ids = {"prompt_set": job.prompt_set_id, "held_out_prompt_set": job.held_out_prompt_set_id}
    for name, set_id in ids.items():
        if request.get(name) is not None and set_id is not None:
            newest = prompt_sets.latest(session, request[name])
            request[name] = request[name] if newest is not None and newest.id == set_id else set_id
    if len(request.get("prompts") or ()) > _MOST_PROMPTS:
        request |= {"prompts": None, "prompt_set": job.prompt_set_id}
    return request


def _page(
    request: Request,
    service: Service,
    start: _Start,
    form: Mapping[str, str],
    answer: _Answer,
    key: str | None = None,
) -> Response:
    with service.uow.reading() as session:
        sets = [row.name for row in prompt_sets.page(session, _SETS, None).rows if row.name is not None]
        trained = results.model_page(session, _MODELS, None).rows
        aliases = results.aliases(session, [model.id for model in trained])
    models = [*service.catalogue.models, *(name for names in aliases.values() for name in names)]
    models += [model.id for model in trained if model.job_id is not None]

    return render(
        request,
        "new-run.html",
        answer.status,
        start=start,
        form=form,
        estimate=answer.estimate,
        problems=answer.problems,
        everyday=[fields()[name] for name in EVERYDAY],
        groups=groups(),
        key=key or secrets.token_urlsafe(16),
        clone_title=None if start.clone is None else jobs.label_of(start.clone),
        sets=sorted(sets),
        models=list(dict.fromkeys(models)),
        scorers=sorted(service.catalogue.scorers),
    )
