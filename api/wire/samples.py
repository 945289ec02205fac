"""Samples and their scores."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel

from api.wire.common import Links
from api.wire.pairs import PairOut


class ScoreOut(BaseModel):
    """What a scorer gave an image."""

    scorer: str
    version: str
    value: float


class TrajectoryOut(BaseModel):
    """Where the denoising trajectory is: a row of a safetensors file."""

    artifact: str
    row: int


class SampleOut(BaseModel):
    """An image."""

    id: str
    job: str
    round: int
    role: str
    split: str
    prompt: str
    prompt_index: int
    number: int
    seed: int
    model: str
    scores: list[ScoreOut]
    image: str
    trajectory: TrajectoryOut | None
    created_at: datetime
    links: Links


class SampleDetail(SampleOut):
    """An image with the pairs that it is in (a reference may serve several)."""

    pairs: list[PairOut]
