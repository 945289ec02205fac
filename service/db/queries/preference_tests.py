"""Queries over human preference tests, their questions and answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import delete, func, select, tuple_
from sqlalchemy.orm import Session

from service.db.queries.pages import Page, fetch_page
from service.db.queries.rows import UNSYNCED, get_row
from service.db.tables import PreferenceAnswer, PreferenceQuestion, PreferenceTest, Sample
from service.errors import NotFoundError
from service.ids import IdKind
from service.states import SampleRole


@dataclass(frozen=True)
class EvaluationImage:
    """An image of an evaluation: of a model, for a prompt of a split and a seed."""

    sample_id: str
    model_id: str
    split: str
    prompt_index: int
    number: int


@dataclass(frozen=True)
class Choices:
    """The number of answers on a split that chose a model at a position; None for "none is better"."""

    split: str
    model_id: str | None
    position: int | None
    count: int


def evaluation_images(session: Session, job_id: str, model_ids: Sequence[str]) -> list[EvaluationImage]:
    """The images of these models that an evaluation made. Their number is that of the job's images at most."""
    columns = (Sample.id, Sample.model_id, Sample.split, Sample.prompt_index, Sample.number)
    query = select(*columns).where(
        Sample.job_id == job_id, Sample.role == SampleRole.EVALUATION, Sample.model_id.in_(model_ids)
    )
    return [EvaluationImage(*row) for row in session.execute(query)]


def get(session: Session, test_id: str) -> PreferenceTest:
    """The test. Raises NotFoundError."""
    return get_row(session, PreferenceTest, IdKind.PREFERENCE_TEST, test_id)


def lock(session: Session, test_id: str) -> PreferenceTest:
    """The test, locked until the transaction ends. Raises NotFoundError."""
    row = session.scalar(select(PreferenceTest).where(PreferenceTest.id == test_id).with_for_update())
    if row is None:
        raise NotFoundError(f"there is no {IdKind.PREFERENCE_TEST.noun} {test_id}")
    return row


def exists(session: Session, test_id: str) -> bool:
    """Whether the test exists."""
    return session.scalar(select(PreferenceTest.id).where(PreferenceTest.id == test_id)) is not None


def page(session: Session, limit: int, cursor: str | None, job_id: str | None = None) -> Page[PreferenceTest]:
    """Tests, newest first; those of an evaluation if it is given."""
    equal = {PreferenceTest.job_id: job_id}
    query = select(PreferenceTest)
    return fetch_page(session, query, PreferenceTest.id, limit, cursor, newest_first=True, equal=equal)


def get_question(session: Session, test_id: str, number: int) -> PreferenceQuestion:
    """The question. Raises NotFoundError."""
    row = session.get(PreferenceQuestion, (test_id, number))
    if row is None:
        raise NotFoundError(f"there is no question {number} of {test_id}")
    return row


def questions(session: Session, test_id: str, numbers: Sequence[int]) -> dict[int, PreferenceQuestion]:
    """The questions with these numbers, by number."""
    query = select(PreferenceQuestion).where(
        PreferenceQuestion.test_id == test_id, PreferenceQuestion.number.in_(sorted(set(numbers)))
    )
    return {row.number: row for row in session.scalars(query)}


def answer_of(session: Session, test_id: str, rater: str, question: int) -> PreferenceAnswer | None:
    """The answer of a rater to a question."""
    return session.get(PreferenceAnswer, (test_id, rater, question))


def answered_by(session: Session, test_id: str, rater: str) -> set[int]:
    """The numbers of the questions that a rater has answered."""
    query = select(PreferenceAnswer.question)
    return set(session.scalars(query.where(PreferenceAnswer.test_id == test_id, PreferenceAnswer.rater == rater)))


def answers_after(
    session: Session, test_id: str, after: tuple[str, int] | None, limit: int
) -> Sequence[PreferenceAnswer]:
    """The next answers of a test, by rater and question.

    Args:
        session: A view of the database.
        test_id: The test.
        after: Rater and question of the last answer before them; None for the first ones.
        limit: The maximum number.
    """
    place = (PreferenceAnswer.rater, PreferenceAnswer.question)
    query = select(PreferenceAnswer).where(PreferenceAnswer.test_id == test_id)
    if after is not None:
        query = query.where(tuple_(*place) > tuple_(*after))
    return session.scalars(query.order_by(*place).limit(limit)).all()


def choices(session: Session, test_id: str) -> list[Choices]:
    """The numbers of answers by split, model and position."""
    # 1. by question, so that the joins read a row for each image and position instead of one for each answer
    given = (PreferenceAnswer.question, PreferenceAnswer.sample_id, PreferenceAnswer.position)
    counted = select(*given, func.count().label("answers")).where(PreferenceAnswer.test_id == test_id)
    by_question = counted.group_by(*given).subquery()

    # 2. by split and model
    split, model_id, position = PreferenceQuestion.split, Sample.model_id, by_question.c.position
    query = (
        select(split, model_id, position, func.sum(by_question.c.answers))
        .select_from(by_question)
        .join(PreferenceQuestion, PreferenceQuestion.number == by_question.c.question)
        .outerjoin(Sample, Sample.id == by_question.c.sample_id)
        .where(PreferenceQuestion.test_id == test_id)
        .group_by(split, model_id, position)
        .order_by(split, model_id, position)
    )
    return [Choices(row[0], row[1], row[2], int(row[3])) for row in session.execute(query)]


def raters(session: Session, test_id: str) -> int:
    """The number of raters who have given an answer."""
    query = select(func.count(PreferenceAnswer.rater.distinct())).where(PreferenceAnswer.test_id == test_id)
    return session.scalar(query) or 0


def splits(session: Session, test_id: str) -> list[str]:
    """The splits of the questions of a test."""
    query = select(PreferenceQuestion.split).where(PreferenceQuestion.test_id == test_id).distinct()
    return list(session.scalars(query.order_by(PreferenceQuestion.split)))


def remove_answers(session: Session, test_id: str, limit: int) -> int:
    """Delete up to `limit` answers of a test. Returns their number."""
    place = (PreferenceAnswer.rater, PreferenceAnswer.question)
    is_owned = PreferenceAnswer.test_id == test_id
    first = select(*place).where(is_owned).limit(limit)
    query = delete(PreferenceAnswer).where(is_owned, tuple_(*place).in_(first))
    result = session.execute(query, execution_options=UNSYNCED)
    return int(getattr(result, "rowcount", 0))


def remove(session: Session, test_id: str) -> None:
    """Delete a test with its questions and all answers that are left."""
    for owned in (PreferenceAnswer.test_id, PreferenceQuestion.test_id):
        session.execute(delete(owned.class_).where(owned == test_id), execution_options=UNSYNCED)
    session.execute(delete(PreferenceTest).where(PreferenceTest.id == test_id), execution_options=UNSYNCED)
