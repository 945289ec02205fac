"""Human preference tests: questions, answers and results."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from api.wire.common import Links, PersonName
from service.states import MAX_COMPARED_MODELS, MAX_PREFERENCE_QUESTIONS, MIN_COMPARED_MODELS

Title = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]
Named = Annotated[str, Field(min_length=1, max_length=100)]


class PreferenceTestIn(BaseModel):
    """Request to create a preference test from the images of an evaluation."""

    model_config = ConfigDict(extra="forbid")

    evaluation: str = Field(max_length=100, description="Id of an evaluation job that has succeeded")
    name: Title | None = Field(None, description="Display name")
    models: list[Named] | None = Field(
        None,
        min_length=MIN_COMPARED_MODELS,
        max_length=MAX_COMPARED_MODELS,
        description="Ids, names or aliases of models of the evaluation. Default: all",
    )
    prompt_sets: list[Named] | None = Field(
        None, min_length=1, max_length=8, description="Prompt sets, as the result of the evaluation names them"
    )
    questions: int | None = Field(
        None,
        ge=1,
        le=MAX_PREFERENCE_QUESTIONS,
        description="Number of questions, drawn at random, evenly over the prompt sets. Default: all prompts and seeds",
    )


class PreferenceTestOut(BaseModel):
    """A preference test, with the number of answers of all raters."""

    id: str
    name: str | None
    evaluation: str
    models: list[str]
    questions: int
    answers: int
    created_at: datetime
    links: Links


class PreferenceQuestionOut(BaseModel):
    """A question as its rater sees it: the images of all models in the rater's order, without the models.

    `place` is the place of the question in the rater's order, from 1. `choice` is the rater's answer: the position of
    an image, from 1, or "none"; null without an answer.
    """

    test: str
    number: int
    place: int
    prompt: str
    images: list[str]
    choice: int | Literal["none"] | None
    answered_at: datetime | None
    links: Links


class NextQuestionOut(BaseModel):
    """The next question that a rater has not answered, null if all are; with the number of answers."""

    question: PreferenceQuestionOut | None
    answered: int
    questions: int


class AnswerIn(BaseModel):
    """A rater's answer to a question."""

    model_config = ConfigDict(extra="forbid")

    choice: Annotated[int, Field(ge=1, le=MAX_COMPARED_MODELS, strict=True)] | Literal["none"] | None = Field(
        description='Position of the best image, from 1; "none" if none is better than all others; null: no answer'
    )
    rater: PersonName | None = Field(None, description="Name of the rater; with API keys, the name of the key")


class RateOut(BaseModel):
    """A number of answers with its share and the Wilson interval of the share; both null without answers."""

    count: int
    share: float | None
    interval: tuple[float, float] | None


class ModelRateOut(RateOut):
    """How often a model was chosen, among all answers."""

    model: str
    name: str


class PositionRateOut(RateOut):
    """How often the image at a position was chosen, among the answers that chose one."""

    position: int


class PairRateOut(BaseModel):
    """Two models: how often `model` was chosen among the answers that chose one of both.

    `chance` is the p-value of the two-sided sign test that both are chosen equally often.
    """

    model: str
    other: str
    wins: int
    losses: int
    share: float | None
    interval: tuple[float, float] | None
    chance: float


class PreferenceRatesOut(BaseModel):
    """The preference rates of the answers on a prompt set, or on all if it is null."""

    prompt_set: str | None
    answers: int
    models: list[ModelRateOut]
    none: RateOut
    pairs: list[PairRateOut]


class PreferenceResultsOut(BaseModel):
    """The results of a preference test: all answers, then those on each prompt set."""

    test: str
    questions: int
    answers: int
    raters: int
    confidence: float
    groups: list[PreferenceRatesOut]
    positions: list[PositionRateOut]
