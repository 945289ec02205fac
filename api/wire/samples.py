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


class MaskPreviewOut(BaseModel):
    """The masks of a reference by item and step, as one grey image, and the settings that they are of.

    Its rows are the items, then the merged mask. Its columns are the steps of the preview, then the mean over the fused
    steps.
    """

    image: str
    thresholds: list[float]
    merge: str
    first_step: int
    last_step: int | None


class PreviewOut(BaseModel):
    """Small images of a sample's denoising: `strip` has a tile for each of `steps`, from left to right.

    Step 0 is noise, and step `num_steps` the image.
    """

    job: str
    num_steps: int
    steps: list[int]
    strip: str
    mask: MaskPreviewOut | None
    created_at: datetime


class SampleDetail(SampleOut):
    """A sample with the pairs that contain it; a reference may belong to several pairs.

    `previews` is null until a preview job has made them: see the link `previews`.
    """

    pairs: list[PairOut]
    previews: PreviewOut | None
