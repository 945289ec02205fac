"""Pairs and reviewers' verdicts."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from api.wire.common import Links, PersonName
from service.states import Verdict


class SideOut(BaseModel):
    """One of the images of a pair, with its score by the pair's scorer."""

    id: str
    seed: int
    score: float | None
    image: str
    href: str


class VerdictIn(BaseModel):
    """A reviewer's verdict on a pair; `prefer` null removes it."""

    model_config = ConfigDict(extra="forbid")

    prefer: Verdict | None
    reviewer: PersonName | None = Field(None, description="Name of the reviewer; with API keys, the name of the key")


class VerdictOut(BaseModel):
    """A reviewer's verdict on a pair, or the combined verdict of all reviewers."""

    prefer: Verdict
    reviewer: str | None
    created_at: datetime


class PairOut(BaseModel):
    """A pair of base and reference, with its target.

    `adopted` is null until the target is verified. `revision` counts changes of verdicts and is the pair's ETag.

    `verdicts` has the verdict of each reviewer, oldest first. `verdict` combines them: what most reviewers prefer, or a
    tie if several choices were given equally often. Its reviewer is null if there are several; its time is that of the
    last one.
    """

    id: str
    job: str
    round: int
    number: int
    prompt: str
    prompt_index: int
    adopted: bool | None
    reason: str | None
    verdict: VerdictOut | None
    verdicts: list[VerdictOut]
    revision: int
    scorer: str
    scorer_version: str
    thresholds: list[float] | None
    reference: SideOut
    base: SideOut
    target: SideOut | None
    statistics: dict[str, Any]
    mask: str | None
    created_at: datetime
    links: Links


class GoldIn(BaseModel):
    """The expected verdict of a gold pair; null makes it an ordinary pair."""

    model_config = ConfigDict(extra="forbid")

    expected: Verdict | None


class GoldOut(BaseModel):
    """The expected verdict of a gold pair; null for other pairs."""

    pair: str
    expected: Verdict | None


class ReviewerOut(BaseModel):
    """The number of a reviewer's verdicts, of those on gold pairs, and of those that are the expected ones.

    The numbers of gold pairs are null for callers without the scope `admin`.
    """

    reviewer: str | None
    judged: int
    gold_judged: int | None
    gold_right: int | None


class AgreementOut(BaseModel):
    """The agreement of reviewers.

    `pairs` counts the pairs with a verdict, at most the newest 10,000. `compared` counts those that several reviewers
    have judged, and `verdicts` the verdicts on these. `alpha` is Krippendorff's alpha: 1 for perfect agreement, 0 for
    that of chance, null if it is undefined because there are no two different verdicts. `reviewers` has at most 100,
    those with the most verdicts first.
    """

    pairs: int
    compared: int
    verdicts: int
    alpha: float | None
    reviewers: list[ReviewerOut]
