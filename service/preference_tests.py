"""Human preference tests: raters choose the image that matches a prompt best (section 4.2).

A test asks about images of an evaluation, which samples all models with the same prompts and seeds. Its questions refer
to these samples. The order of the images of a question, and of the questions, is random for each rater. It follows from
the ids by a hash, so it stays the same when a rater returns (docs/decisions/026-preference-tests.md).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from sqlalchemy.orm import Session

from dfusion.preference_test import Preferences, Rate, preferences
from service.db.clock import now_seconds
from service.db.queries import jobs, preference_tests, results, stages
from service.db.queries.preference_tests import Choices, EvaluationImage
from service.db.tables import Job, PreferenceAnswer, PreferenceQuestion, PreferenceTest
from service.db.unit_of_work import repeatable
from service.errors import ConflictError, InvalidRequestError, NotFoundError
from service.ids import IdKind, new_id
from service.jobs.kinds import evaluation
from service.service import Service
from service.states import MAX_COMPARED_MODELS, MAX_PREFERENCE_QUESTIONS, MIN_COMPARED_MODELS, JobKind, JobState

_REMOVED_AT_ONCE = 5000
_Key = tuple[str, int, int]
"""A prompt and a seed of an evaluation: its split, the index of the prompt, and the number of the sample."""


@dataclass(frozen=True)
class NewTest:
    """A request for a preference test.

    Attributes:
        evaluation: The evaluation job.
        name: Display name.
        models: Ids, names or aliases of the models; None for all of the evaluation.
        prompt_sets: The prompt sets, as the evaluation names them; None for all.
        questions: The number of questions; None for all.
    """

    evaluation: str
    name: str | None = None
    models: Sequence[str] | None = None
    prompt_sets: Sequence[str] | None = None
    questions: int | None = None


@dataclass(frozen=True)
class Asked:
    """A question as a rater sees it.

    Attributes:
        question: The question.
        place: Its place in the rater's order of questions, from 1.
        samples: The ids of its samples in the rater's order.
        answer: The rater's answer; None without one.
    """

    question: PreferenceQuestion
    place: int
    samples: list[str]
    answer: PreferenceAnswer | None


@dataclass(frozen=True)
class PreferenceResults:
    """The results of a preference test.

    Attributes:
        raters: The number of raters.
        overall: The preference rates of all answers.
        splits: Those of each prompt set.
        positions: How often an image was chosen at each position, among the answers that chose one.
    """

    raters: int
    overall: Preferences
    splits: Mapping[str, Preferences]
    positions: Mapping[int, Rate]


def create(service: Service, request: NewTest) -> PreferenceTest:
    """Create a test of an evaluation that has succeeded.

    It reads the ids of the evaluation's samples, and writes up to `MAX_PREFERENCE_QUESTIONS` rows.

    Raises:
        InvalidRequestError: A field does not fit the evaluation.
        ConflictError: The evaluation has not succeeded.
    """
    test_id = new_id(IdKind.PREFERENCE_TEST)
    with service.uow.reading() as session:
        job = _evaluation(session, request.evaluation)
        models = _models(session, job, request.models)
        images = preference_tests.evaluation_images(session, job.id, models)
    keys = _drawn(test_id, _by_split(images, request.prompt_sets), request.questions)

    samples = {(image.split, image.prompt_index, image.number, image.model_id): image.sample_id for image in images}
    rows = [
        PreferenceQuestion(
            test_id=test_id, number=number, split=key[0], samples=[samples[(*key, model)] for model in models]
        )
        for number, key in enumerate(keys)
    ]

    def insert(session: Session) -> PreferenceTest:
        jobs.lock_kept(session, job.id)  # it cannot be deleted meanwhile
        test = PreferenceTest(
            id=test_id,
            name=request.name,
            job_id=job.id,
            models=models,
            questions=len(rows),
            created_at=now_seconds(),
        )
        results.add_all(session, [test, *rows])
        return preference_tests.get(session, test_id)

    return service.uow.run(insert, lambda session, test: preference_tests.exists(session, test.id))


def _evaluation(session: Session, job_id: str) -> Job:
    """The evaluation job. Raises InvalidRequestError, or ConflictError if it has not succeeded."""
    try:
        job = jobs.get(session, job_id)
    except NotFoundError as error:
        raise InvalidRequestError.at("/evaluation", str(error), "unknown_job") from error
    if job.kind != JobKind.EVALUATION:
        raise InvalidRequestError.at("/evaluation", f"expected an evaluation, got {job.id}, which is a {job.kind} job")
    if job.state != JobState.SUCCEEDED:
        raise ConflictError(f"{job.id} is {job.state}: expected an evaluation that has succeeded")
    return job


def _models(session: Session, job: Job, names: Sequence[str] | None) -> list[str]:
    """The ids of the models of the test, in the order of the request. Raises InvalidRequestError."""
    evaluated = list(evaluation.resolved(stages.params_of_job(session, job.id))["models"])
    if names is None:
        _require_number(len(evaluated), "the evaluation has")
        return evaluated

    chosen = []
    for position, name in enumerate(names):
        row = results.find_model(session, name)
        if row is None or row.id not in evaluated:
            message = f"expected a model of the evaluation: {', '.join(evaluated)}; got {name!r}"
            raise InvalidRequestError.at(f"/models/{position}", message, "unknown_model")
        chosen.append(row.id)
    if len(set(chosen)) < len(chosen):
        raise InvalidRequestError.at("/models", "expected different models, got one twice")
    _require_number(len(chosen), "got")
    return chosen


def _require_number(count: int, subject: str) -> None:
    if not MIN_COMPARED_MODELS <= count <= MAX_COMPARED_MODELS:
        message = f"expected {MIN_COMPARED_MODELS} to {MAX_COMPARED_MODELS} models, {subject} {count}"
        raise InvalidRequestError.at("/models", message)


def _by_split(images: Iterable[EvaluationImage], wanted: Sequence[str] | None) -> dict[str, list[_Key]]:
    """The prompts and seeds by split. Raises InvalidRequestError for an unknown split."""
    by_split: dict[str, dict[_Key, None]] = {}
    for image in images:
        by_split.setdefault(image.split, {})[(image.split, image.prompt_index, image.number)] = None

    for position, name in enumerate(wanted or ()):
        if name not in by_split:
            message = f"expected a prompt set of the evaluation: {', '.join(sorted(by_split))}; got {name!r}"
            raise InvalidRequestError.at(f"/prompt_sets/{position}", message, "unknown_prompt_set")
    return {split: list(keys) for split, keys in sorted(by_split.items()) if wanted is None or split in wanted}


def _drawn(test_id: str, by_split: Mapping[str, Sequence[_Key]], wanted: int | None) -> list[_Key]:
    """The questions: all, or a number of them at random, the same number of each split as far as possible."""
    available = sum(map(len, by_split.values()))
    count = available if wanted is None else wanted
    if count > available:
        message = f"expected at most {available} questions, the prompts and seeds of the evaluation; got {count}"
        raise InvalidRequestError.at("/questions", message)
    if count > MAX_PREFERENCE_QUESTIONS:
        message = f"expected at most {MAX_PREFERENCE_QUESTIONS} questions, the evaluation has {count}: name a number"
        raise InvalidRequestError.at("/questions", message)

    shuffled = [sorted(keys, key=lambda key: _rank(test_id, *key)) for keys in by_split.values()]
    in_turn = (key for key in chain.from_iterable(zip_longest(*shuffled)) if key is not None)
    return [key for key, _ in zip(in_turn, range(count), strict=False)]


def delete(service: Service, test_id: str) -> None:
    """Delete a test with its answers, in transactions of a bounded size. Raises NotFoundError."""
    with service.uow.reading() as session:
        preference_tests.get(session, test_id)

    def remove_some(session: Session) -> int:
        test = preference_tests.lock(session, test_id)
        removed = preference_tests.remove_answers(session, test_id, _REMOVED_AT_ONCE)
        test.answers -= removed
        return removed

    def remove(session: Session) -> None:
        preference_tests.lock(session, test_id)
        preference_tests.remove(session, test_id)

    while service.uow.run(remove_some, repeatable):
        pass
    service.uow.run(remove, lambda session, _: not preference_tests.exists(session, test_id))


def question_order(test: PreferenceTest, rater: str) -> list[int]:
    """The numbers of all questions in the rater's order."""
    return sorted(range(test.questions), key=lambda number: _rank(test.id, rater, number))


def image_order(question: PreferenceQuestion, rater: str) -> list[str]:
    """The ids of the samples of a question in the rater's order."""
    return sorted(question.samples, key=lambda sample: _rank(question.test_id, question.number, rater, sample))


def _rank(*parts: str | int) -> bytes:
    return hashlib.sha256(json.dumps(parts).encode()).digest()


def next_question(session: Session, test: PreferenceTest, rater: str, after: int | None = None) -> int | None:
    """The number of the next question that the rater has not answered, in the rater's order.

    Args:
        session: A view of the database.
        test: The test.
        rater: The name of the rater.
        after: Only questions after this one; None for all.
    """
    order = question_order(test, rater)
    answered = preference_tests.answered_by(session, test.id, rater)
    start = 0 if after is None else order.index(after) + 1
    return next((number for number in order[start:] if number not in answered), None)


def ask(session: Session, test: PreferenceTest, number: int, rater: str) -> Asked:
    """A question as the rater sees it. Raises NotFoundError."""
    question = preference_tests.get_question(session, test.id, number)
    place = question_order(test, rater).index(number) + 1
    answer = preference_tests.answer_of(session, test.id, rater, number)
    return Asked(question, place, image_order(question, rater), answer)


def answer(service: Service, test_id: str, number: int, rater: str, position: int | None) -> None:
    """Store the answer of a rater. It replaces an earlier one.

    Args:
        service: The installation.
        test_id: The test.
        number: The number of the question.
        rater: The name of the rater.
        position: The position of the best image, from 1; None if no image is better than all others.

    Raises:
        NotFoundError: No such test or question exists.
        InvalidRequestError: The question has no image at this position.
    """

    def store(session: Session) -> None:
        test = preference_tests.lock(session, test_id)
        question = preference_tests.get_question(session, test.id, number)
        if position is not None and not 1 <= position <= len(question.samples):
            message = f"expected the position of an image, 1 to {len(question.samples)}, got {position}"
            raise InvalidRequestError.at("/choice", message)

        sample_id = None if position is None else image_order(question, rater)[position - 1]
        values = {"sample_id": sample_id, "position": position, "answered_at": jobs.now(session)}
        if preference_tests.answer_of(session, test.id, rater, number) is None:
            test.answers += 1
        session.merge(PreferenceAnswer(test_id=test.id, rater=rater, question=number, **values))

    service.uow.run(store, repeatable)


def withdraw(service: Service, test_id: str, number: int, rater: str) -> None:
    """Remove the answer of a rater. Does nothing if there is none. Raises NotFoundError."""

    def remove(session: Session) -> None:
        test = preference_tests.lock(session, test_id)
        question = preference_tests.get_question(session, test.id, number)
        row = preference_tests.answer_of(session, test.id, rater, question.number)
        if row is not None:
            session.delete(row)
            test.answers -= 1

    service.uow.run(remove, repeatable)


def results_of(session: Session, test: PreferenceTest, confidence: float) -> PreferenceResults:
    """The preference rates of a test, overall, by prompt set and by position."""
    choices = preference_tests.choices(session, test.id)
    of_split: dict[str, list[Choices]] = {split: [] for split in preference_tests.splits(session, test.id)}
    for row in choices:
        of_split[row.split].append(row)
    chosen = sum(row.count for row in choices if row.position is not None)
    at_position = {
        position: sum(row.count for row in choices if row.position == position)
        for position in range(1, len(test.models) + 1)
    }
    return PreferenceResults(
        raters=preference_tests.raters(session, test.id),
        overall=_preferences(test, choices, confidence),
        splits={split: _preferences(test, rows, confidence) for split, rows in of_split.items()},
        positions={position: Rate(count, chosen, confidence) for position, count in at_position.items()},
    )


def _preferences(test: PreferenceTest, choices: Iterable[Choices], confidence: float) -> Preferences:
    wins: dict[str | None, int] = dict.fromkeys((*test.models, None), 0)
    for row in choices:
        wins[row.model_id] += row.count
    none = wins.pop(None)
    return preferences({str(model): count for model, count in wins.items()}, none, confidence)
