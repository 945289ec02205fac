"""Routes of human preference tests: create, answer and evaluate them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

from fastapi import APIRouter, Path, Query, Response, status
from fastapi.responses import StreamingResponse
from pydantic import Field
from sqlalchemy.orm import Session

from api.access import require_scope
from api.converters.common import convert_page, utc
from api.converters.models import display_name
from api.converters.preference_tests import preference_test_out, question_out, results_out
from api.csv_text import CSV, CsvResponse, csv_text
from api.deps import CallerDep, PageParameters, Parameters, ServiceDep
from api.openapi import CREATED_PREFERENCE_TEST
from api.wire.common import ListOut, PersonName
from api.wire.preference_tests import (
    AnswerIn,
    NextQuestionOut,
    PreferenceQuestionOut,
    PreferenceResultsOut,
    PreferenceTestIn,
    PreferenceTestOut,
)
from service import preference_tests
from service.db.queries import preference_tests as rows
from service.db.queries import results
from service.db.tables import PreferenceAnswer, PreferenceTest
from service.errors import InvalidRequestError
from service.ids import IdKind, expect
from service.keys import Caller
from service.service import Service

router = APIRouter(prefix="/preference-tests", tags=["preference tests"], dependencies=[require_scope("read")])
_ANSWERS_PER_READ = 1000
_RESULT_COLUMNS = ("prompt_set", "model", "name", "wins", "answers", "share", "low", "high")
_ANSWER_COLUMNS = (
    "rater",
    "question",
    "prompt_set",
    "prompt",
    "seed",
    "shown",
    "position",
    "model",
    "name",
    "sample",
    "answered_at",
)
Number = Annotated[int, Path(ge=0, le=1_000_000, description="Number of the question")]


class PreferenceTestListParameters(PageParameters):
    """Filters of the list of preference tests."""

    evaluation: str | None = None


class RaterParameters(Parameters):
    """The rater; with API keys, the name of the key."""

    rater: PersonName | None = None


class PreferenceResultParameters(Parameters):
    """The confidence level of the intervals."""

    confidence: float = Field(0.95, gt=0.5, lt=1)


@router.post(
    "",
    status_code=status.HTTP_201_CREATED,
    dependencies=[require_scope("submit")],
    responses={status.HTTP_201_CREATED: CREATED_PREFERENCE_TEST},
)
def create_preference_test(body: PreferenceTestIn, service: ServiceDep, response: Response) -> PreferenceTestOut:
    """Create a preference test from the images of an evaluation, which has all models on the same prompts and seeds.

    The evaluation cannot be deleted before the test. 409 if it has not succeeded.
    """
    request = preference_tests.NewTest(body.evaluation, body.name, body.models, body.prompt_sets, body.questions)
    test = preference_tests.create(service, request)
    response.headers["Location"] = f"/preference-tests/{test.id}"
    return preference_test_out(test)


@router.get("")
def list_preference_tests(
    service: ServiceDep, filters: Annotated[PreferenceTestListParameters, Query()]
) -> ListOut[PreferenceTestOut]:
    """List preference tests, newest first."""
    job_id = None if filters.evaluation is None else expect(IdKind.JOB, filters.evaluation)
    with service.uow.reading() as session:
        page = rows.page(session, filters.limit, filters.cursor, job_id)
        return convert_page(ListOut[PreferenceTestOut], page, preference_test_out)


@router.get("/{test_id}")
def get_preference_test(test_id: str, service: ServiceDep) -> PreferenceTestOut:
    """Return a preference test."""
    with service.uow.reading() as session:
        return preference_test_out(rows.get(session, test_id))


@router.delete(
    "/{test_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    response_class=Response,
    dependencies=[require_scope("submit")],
)
def delete_preference_test(test_id: str, service: ServiceDep) -> None:
    """Delete a preference test with all its answers."""
    preference_tests.delete(service, test_id)


@router.get("/{test_id}/next")
def next_preference_question(
    test_id: str, service: ServiceDep, caller: CallerDep, parameters: Annotated[RaterParameters, Query()]
) -> NextQuestionOut:
    """Return the rater's next question without an answer. Each rater gets the questions in another random order."""
    rater = rater_of(parameters.rater, caller)
    with service.uow.reading() as session:
        test = rows.get(session, test_id)
        number = preference_tests.next_question(session, test, rater)
        return NextQuestionOut(
            question=None if number is None else _question(session, test, number, rater),
            answered=len(rows.answered_by(session, test.id, rater)),
            questions=test.questions,
        )


@router.get("/{test_id}/questions/{number}")
def get_preference_question(
    test_id: str,
    number: Number,
    service: ServiceDep,
    caller: CallerDep,
    parameters: Annotated[RaterParameters, Query()],
) -> PreferenceQuestionOut:
    """Return a question, with the images in the rater's order and the rater's answer."""
    rater = rater_of(parameters.rater, caller)
    with service.uow.reading() as session:
        return _question(session, rows.get(session, test_id), number, rater)


def _question(session: Session, test: PreferenceTest, number: int, rater: str) -> PreferenceQuestionOut:
    asked = preference_tests.ask(session, test, number, rater)
    return question_out(asked, results.samples(session, asked.samples))


@router.put("/{test_id}/questions/{number}/answer", dependencies=[require_scope("review")])
def put_preference_answer(
    test_id: str, number: Number, answer: AnswerIn, service: ServiceDep, caller: CallerDep
) -> PreferenceQuestionOut:
    """Answer a question, change the answer, or remove it with `choice` null.

    Where API keys are required, the rater is the name of the key.
    """
    rater = rater_of(answer.rater, caller)
    if answer.choice is None:
        preference_tests.withdraw(service, test_id, number, rater)
    else:
        preference_tests.answer(service, test_id, number, rater, None if answer.choice == "none" else answer.choice)
    with service.uow.reading() as session:
        return _question(session, rows.get(session, test_id), number, rater)


def rater_of(name: str | None, caller: Caller) -> str:
    """The rater: the name of the API key, or without keys the name in the request. Raises InvalidRequestError."""
    if caller.name is not None:
        if name not in (None, caller.name):
            raise InvalidRequestError.at("/rater", f"expected no name or {caller.name!r}, the name of the API key")
        return caller.name
    if name is None:
        raise InvalidRequestError.at("/rater", "expected the name of the rater")
    return name


@router.get("/{test_id}/results")
def get_preference_results(
    test_id: str, service: ServiceDep, parameters: Annotated[PreferenceResultParameters, Query()]
) -> PreferenceResultsOut:
    """Return how often each model was chosen, with Wilson intervals, overall and by prompt set.

    The intervals take answers as independent.
    """
    with service.uow.reading() as session:
        test = rows.get(session, test_id)
        rates = preference_tests.results_of(session, test, parameters.confidence)
        return results_out(test, rates, _names(session, test), parameters.confidence)


def _names(session: Session, test: PreferenceTest) -> dict[str, str]:
    """The names of the models of a test, by id."""
    return {model_id: display_name(model) for model_id, model in results.models(session, test.models).items()}


@router.get("/{test_id}/results.csv", response_class=CsvResponse)
def get_preference_results_csv(
    test_id: str, service: ServiceDep, parameters: Annotated[PreferenceResultParameters, Query()]
) -> Response:
    """Return the preference rates as CSV: a line for each prompt set and model, with an empty prompt set for all."""
    rates = get_preference_results(test_id, service, parameters)
    lines: list[tuple[object, ...]] = [_RESULT_COLUMNS]
    for group in rates.groups:
        named = [(rate.model, rate.name, rate) for rate in group.models]
        for model, name, rate in (*named, (None, "none", group.none)):
            low, high = rate.interval or (None, None)
            lines.append((group.prompt_set, model, name, rate.count, group.answers, rate.share, low, high))
    return CsvResponse(csv_text(lines), headers=_download(f"{test_id}-results.csv"))


def _download(name: str) -> dict[str, str]:
    return {"Content-Disposition": f'attachment; filename="{name}"'}


@router.get("/{test_id}/answers.csv", response_class=CsvResponse)
def get_preference_answers_csv(test_id: str, service: ServiceDep) -> StreamingResponse:
    """Return all answers as CSV, a line each. `shown` has the models in the order of their images."""
    with service.uow.reading() as session:
        test = rows.get(session, test_id)
        names = _names(session, test)
    headers = _download(f"{test_id}-answers.csv")
    return StreamingResponse(_answer_pages(service, test, names), media_type=CSV, headers=headers)


def _answer_pages(service: Service, test: PreferenceTest, names: dict[str, str]) -> Iterator[str]:
    """The answers as CSV, page by page, since their number has no bound."""
    yield csv_text([_ANSWER_COLUMNS])
    after: tuple[str, int] | None = None
    while True:
        with service.uow.reading() as session:
            answers = rows.answers_after(session, test.id, after, _ANSWERS_PER_READ)
            yield csv_text(_answer_lines(session, test, names, answers))
        if len(answers) < _ANSWERS_PER_READ:
            return
        after = (answers[-1].rater, answers[-1].question)


def _answer_lines(
    session: Session, test: PreferenceTest, names: dict[str, str], answers: Sequence[PreferenceAnswer]
) -> Iterator[tuple[object, ...]]:
    questions = rows.questions(session, test.id, [answer.question for answer in answers])
    samples = results.samples(session, [question.samples[0] for question in questions.values()])
    for answer in answers:
        question = questions[answer.question]
        first = samples[question.samples[0]]
        model_of = dict(zip(question.samples, test.models, strict=True))
        model = None if answer.sample_id is None else model_of[answer.sample_id]
        yield (
            answer.rater,
            answer.question,
            question.split,
            first.prompt,
            first.seed,
            ";".join(model_of[sample] for sample in preference_tests.image_order(question, answer.rater)),
            answer.position,
            model,
            "none" if model is None else names.get(model, model),
            answer.sample_id,
            utc(answer.answered_at).isoformat(),
        )
