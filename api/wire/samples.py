"""Samples and their scores."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel

from api.wire.common import Links
from api.wire.pairs import PairOut


class ScoreOut(BaseModel):
    """The score of an image by one scorer."""

    scorer: str
    version: str
    value: float


class TrajectoryOut(BaseModel):
    """The location of a denoising trajectory: a row of a safetensors file."""

    artifact: str
    row: int


class SampleOut(BaseModel):
    """A sample: one image with its prompt, seed and scores."""

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
    """A sample with the pairs that contain it; a reference may belong to several pairs."""

    pairs: list[PairOut]
