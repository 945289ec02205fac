"""Jobs, their stages, events and metrics."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from api.wire.common import Links
from dfusion.rewards.signs import SignName
from service.jobs.kinds.rounds import Rounds, StopWhen
from service.states import JobKind, JobState


class ProgressOut(BaseModel):
    """Progress of the current stage (`done` of `total`) and of the job (`percent`).

    The current stage is number `shard`, counted from 0, of the `shards` equal parts of its kind and round.
    """

    stage: str | None
    round: int | None
    shard: int | None
    shards: int
    done: int
    total: int
    percent: float
    eta_seconds: float | None = Field(description="Estimated time left; null for a job that does not run")


class JobErrorOut(BaseModel):
    """Why a job failed."""

    code: str
    message: str


class BestRoundOut(BaseModel):
    """The best round of a run so far: 0 is the model before the first round.

    `mean` is the highest mean of `scorer` on the prompts of `split`, by which it was chosen.
    """

    round: int
    model: str
    split: str
    scorer: str
    mean: float


class StoppedOut(BaseModel):
    """Why a run ended before its last round: after `round` of the `rounds` of the request, `sign` of `stop_when`."""

    round: int
    rounds: int
    sign: SignName
    reason: str


class StageOut(BaseModel):
    """A stage of a job. `crashes` and `failures`: lost workers and failed attempts since its last checkpoint."""

    id: str
    kind: str
    queue: str
    round: int
    shard: int
    state: str
    worker: str | None
    done: int
    total: int
    attempts: int
    crashes: int
    failures: int
    started_at: datetime | None
    finished_at: datetime | None
    error: JobErrorOut | None


class JobOut(BaseModel):
    """A job in a list. `storage_bytes`: the size of its files and of the current checkpoints of its stages."""

    id: str
    kind: JobKind
    state: JobState
    label: str | None
    priority: int
    rounds: int
    model: str | None
    prompt_set: str | None
    held_out_prompt_set: str | None
    origin: str | None
    progress: ProgressOut
    attempts: int
    storage_bytes: int
    error: JobErrorOut | None
    stopped: StoppedOut | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    links: Links


class ReviewOut(BaseModel):
    """What a job in the state `waiting` waits for: verdicts on `pairs` pairs, of which `judged` have one.

    `href` lists these pairs.
    """

    round: int
    pairs: int
    judged: int
    href: str


class JobDetail(JobOut):
    """A job with its validated request, its outputs so far and, for an evaluation, its result.

    `review` is what a job in the state `waiting` waits for; null in other states.
    """

    spec: dict[str, Any]
    outputs: dict[str, int]
    last_model: str | None
    best: BestRoundOut | None
    review: ReviewOut | None
    result: dict[str, Any] | None


class JobChange(BaseModel):
    """A change of a round job that has succeeded: a higher number of all its rounds, and when it stops before them."""

    model_config = ConfigDict(extra="forbid")

    rounds: Rounds
    stop_when: StopWhen | None = Field(None, description="null = as before; [] = the job does not stop early")


class EventOut(BaseModel):
    """An event of a job."""

    id: int
    created_at: datetime
    kind: str
    message: str
    stage: str | None
    data: dict[str, Any]


class MetricOut(BaseModel):
    """Scores of one round's images. `training_images` counts the images that the model was trained on."""

    round: int
    split: str
    scorer: str
    version: str
    model: str
    training_images: int
    count: int
    mean: float
    std: float


class TrainingOut(BaseModel):
    """Statistics of a round's training: those of its last update, measured on the policy before that update.

    `log_ratio_preferred` and `log_ratio_rejected` are mean log-ratios to the policy before the round (dpo). `log` in
    the model's statistics links the file with all updates. `rows_per_second` is the mean of all updates; a row is one
    step of one example.
    """

    round: int
    model: str
    examples: int
    updates: int
    loss: float | None
    accuracy: float | None
    log_ratio_preferred: float | None
    log_ratio_rejected: float | None
    below_epsilon: float | None
    grad_norm: float | None
    rows_per_second: float | None


class PairingOut(BaseModel):
    """The pairs of a round. `without_pair` counts the prompts whose best samples score no more than the others.

    The event `round.paired` names the first of these prompts.
    """

    round: int
    pairs: int
    samples: int
    without_pair: int


class MetricsOut(BaseModel):
    """Metrics of a job, by round, split and scorer, and its pairings and trainings by round: a page of rounds."""

    data: list[MetricOut]
    pairings: list[PairingOut]
    trainings: list[TrainingOut]
    has_more: bool
    next_cursor: str | None
