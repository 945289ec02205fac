"""Conversion of preference tests, questions and results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from api.converters.common import utc
from api.wire.preference_tests import (
    ModelRateOut,
    PairRateOut,
    PositionRateOut,
    PreferenceQuestionOut,
    PreferenceRatesOut,
    PreferenceResultsOut,
    PreferenceTestOut,
    RateOut,
)
from dfusion.preference_test import PairRate, Preferences, Rate
from service.db.tables import PreferenceTest, Sample
from service.preference_tests import Asked, PreferenceResults


def preference_test_out(row: PreferenceTest) -> PreferenceTestOut:
    path = f"/preference-tests/{row.id}"
    return PreferenceTestOut(
        id=row.id,
        name=row.name,
        evaluation=row.job_id,
        models=row.models,
        questions=row.questions,
        answers=row.answers,
        created_at=utc(row.created_at),
        links={
            "self": path,
            "evaluation": f"/jobs/{row.job_id}",
            "next": f"{path}/next",
            "results": f"{path}/results",
            "results.csv": f"{path}/results.csv",
            "answers.csv": f"{path}/answers.csv",
        },
    )


def question_out(asked: Asked, samples: Mapping[str, Sample]) -> PreferenceQuestionOut:
    question = asked.question
    answer = asked.answer
    choice: int | Literal["none"] | None = None
    if answer is not None:
        choice = answer.position if answer.position is not None else "none"
    path = f"/preference-tests/{question.test_id}"
    return PreferenceQuestionOut(
        test=question.test_id,
        number=question.number,
        place=asked.place,
        prompt=samples[asked.samples[0]].prompt,
        images=[f"/artifacts/{samples[sample].image_artifact_id}" for sample in asked.samples],
        choice=choice,
        answered_at=None if answer is None else utc(answer.answered_at),
        links={"test": path, "answer": f"{path}/questions/{question.number}/answer"},
    )


def results_out(
    row: PreferenceTest, results: PreferenceResults, names: Mapping[str, str], confidence: float
) -> PreferenceResultsOut:
    groups = [_group(None, results.overall, names)]
    groups += [_group(split, rates, names) for split, rates in results.splits.items()]
    return PreferenceResultsOut(
        test=row.id,
        questions=row.questions,
        answers=results.overall.answers,
        raters=results.raters,
        confidence=confidence,
        groups=groups,
        positions=[PositionRateOut(position=n, **_rate(rate)) for n, rate in results.positions.items()],
    )


def _group(prompt_set: str | None, rates: Preferences, names: Mapping[str, str]) -> PreferenceRatesOut:
    return PreferenceRatesOut(
        prompt_set=prompt_set,
        answers=rates.answers,
        models=[
            ModelRateOut(model=model, name=names.get(model, model), **_rate(rate))
            for model, rate in rates.models.items()
        ],
        none=RateOut(**_rate(rates.none)),
        pairs=[_pair(pair) for pair in rates.pairs],
    )


def _rate(rate: Rate) -> dict[str, Any]:
    return {"count": rate.count, "share": rate.rate, "interval": rate.interval}


def _pair(pair: PairRate) -> PairRateOut:
    wins = pair.wins
    return PairRateOut(
        model=pair.model,
        other=pair.other,
        wins=wins.count,
        losses=wins.total - wins.count,
        share=wins.rate,
        interval=wins.interval,
        chance=pair.chance,
    )
