"""What the service answers. `/…` strings are paths of this service."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, field_validator

from service.db.queries.jobs import JobView
from service.db.queries.pages import Page
from service.db.tables import (
    ApiKey,
    Artifact,
    Event,
    Export,
    Job,
    Metric,
    Model,
    Pair,
    PromptSet,
    Sample,
    Score,
    Stage,
    Worker,
)
from service.jobs.estimates import Estimate
from service.jobs.progress import progress_of
from service.keys import KeyScope
from service.plan import Counts
from service.states import JobKind, JobState, Verdict

T = TypeVar("T")
Row = TypeVar("Row")
Links = dict[str, str]


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _maybe_time(seconds: float | None) -> datetime | None:
    return None if seconds is None else _time(seconds)


def _artifact_path(artifact_id: str | None) -> str | None:
    return None if artifact_id is None else f"/artifacts/{artifact_id}"


class ListOut(BaseModel, Generic[T]):
    """A page of a list."""

    data: list[T]
    has_more: bool
    next_cursor: str | None

    @classmethod
    def of(cls, page: Page[Row], convert: Callable[[Row], T]) -> ListOut[T]:
        data = [convert(row) for row in page.rows]
        return cls(data=data, has_more=page.next_cursor is not None, next_cursor=page.next_cursor)


class FieldError(BaseModel):
    """A field and what is wrong with it; `pointer` is a JSON pointer into the body, or a parameter's name."""

    pointer: str
    message: str


class Problem(BaseModel):
    """An error (RFC 9457), as application/problem+json."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    errors: list[FieldError]


class ProgressOut(BaseModel):
    """The current stage with its own count, and the share of the whole job."""

    stage: str | None
    round: int | None
    done: int
    total: int
    percent: float
    eta_seconds: float | None


class JobErrorOut(BaseModel):
    """Why a job failed."""

    code: str
    message: str


class StageOut(BaseModel):
    """A stage of a job."""

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
    started_at: datetime | None
    finished_at: datetime | None
    error: JobErrorOut | None

    @classmethod
    def of(cls, row: Stage) -> StageOut:
        return cls(
            id=row.id,
            kind=row.kind,
            queue=row.queue,
            round=row.round,
            shard=row.shard,
            state=row.state,
            worker=row.lease_owner,
            done=row.progress_done,
            total=row.progress_total,
            attempts=row.attempt,
            crashes=row.crash_count,
            started_at=_maybe_time(row.started_at),
            finished_at=_maybe_time(row.finished_at),
            error=_error(row.error_code, row.error_message),
        )


class JobOut(BaseModel):
    """A job in a list."""

    id: str
    kind: JobKind
    state: JobState
    label: str | None
    rounds: int
    model: str | None
    prompt_set: str | None
    held_out_prompt_set: str | None
    origin: str | None
    progress: ProgressOut
    attempts: int
    error: JobErrorOut | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    links: Links

    @classmethod
    def of(cls, job: Job, stages: Sequence[Stage], now: float) -> JobOut:
        return cls(**_job_fields(job, stages, now))


class JobDetail(JobOut):
    """A job with its checked request, its stages, what it has made so far, and what it found (an evaluation)."""

    spec: dict[str, Any]
    stages: list[StageOut]
    made: dict[str, int]
    last_model: str | None
    result: dict[str, Any] | None

    @classmethod
    def detailed(cls, view: JobView, stages: Sequence[Stage]) -> JobDetail:
        job = view.job
        return cls(
            **_job_fields(job, stages, view.now),
            spec=job.spec,
            stages=[StageOut.of(stage) for stage in stages],
            made={"samples": job.samples_made, "pairs": job.pairs_made, "models": job.models_made},
            last_model=view.last_model_id,
            result=job.result,
        )


def _job_fields(job: Job, stages: Sequence[Stage], now: float) -> dict[str, Any]:
    progress = progress_of(job, stages, now)
    return {
        "id": job.id,
        "kind": job.kind,
        "state": job.state,
        "label": job.label,
        "rounds": job.rounds,
        "model": job.model_id,
        "prompt_set": job.prompt_set_id,
        "held_out_prompt_set": job.held_out_prompt_set_id,
        "origin": job.origin_id,
        "progress": ProgressOut(**progress.__dict__),
        "attempts": max((stage.attempt for stage in stages), default=0),
        "error": _error(job.error_code, job.error_message),
        "created_at": _time(job.created_at),
        "started_at": _maybe_time(job.started_at),
        "finished_at": _maybe_time(job.finished_at),
        "links": {
            "self": f"/jobs/{job.id}",
            "events": f"/jobs/{job.id}/events",
            "logs": f"/jobs/{job.id}/logs",
            "metrics": f"/jobs/{job.id}/metrics",
            "samples": f"/samples?job={job.id}",
            "pairs": f"/pairs?job={job.id}",
            "models": f"/models?job={job.id}",
            "cancel": f"/jobs/{job.id}/cancel",
            "pause": f"/jobs/{job.id}/pause",
            "resume": f"/jobs/{job.id}/resume",
        },
    }


def _error(code: str | None, message: str | None) -> JobErrorOut | None:
    return None if code is None else JobErrorOut(code=code, message=message or "")


class ImageCounts(BaseModel):
    """Images that a job makes."""

    sampled: int
    fused_at_most: int
    evaluated: int
    total_at_most: int


class UnetCounts(BaseModel):
    """Rows that go through the U-Net; guidance takes two for one image and step."""

    sampling: int
    fusion_at_most: int
    training_at_most: int
    evaluation: int
    total_at_most: int


class EstimateOut(BaseModel):
    """What a job would take; nothing was made. `seconds` (on one worker), `memory_bytes` (of its GPU, or of the machine
    where it has none) and `storage_bytes` are judged by this installation's own past jobs, null where there are none.
    """

    dry_run: bool
    images: ImageCounts
    unet_evaluations: UnetCounts
    seconds: float | None
    memory_bytes: int | None
    storage_bytes: int | None

    @classmethod
    def of(cls, counts: Counts, estimate: Estimate) -> EstimateOut:
        return cls(
            dry_run=True,
            images=ImageCounts(
                sampled=counts.sampled,
                fused_at_most=counts.fused_at_most,
                evaluated=counts.evaluated,
                total_at_most=counts.images,
            ),
            unet_evaluations=UnetCounts(
                sampling=counts.sampling,
                fusion_at_most=counts.fusion_at_most,
                training_at_most=counts.training_at_most,
                evaluation=counts.evaluation,
                total_at_most=counts.unet_evaluations,
            ),
            seconds=estimate.seconds,
            memory_bytes=estimate.memory_bytes,
            storage_bytes=estimate.storage_bytes,
        )


class EventOut(BaseModel):
    """Something that happened to a job."""

    id: int
    at: datetime
    kind: str
    message: str
    stage: str | None
    data: dict[str, Any]

    @classmethod
    def of(cls, row: Event) -> EventOut:
        return cls(id=row.id, at=_time(row.at), kind=row.kind, message=row.message, stage=row.stage_id, data=row.data)


class MetricOut(BaseModel):
    """Scores of one round's images. `training_images` is how many the model had been trained on by then."""

    round: int
    split: str
    scorer: str
    version: str
    model: str
    training_images: int
    count: int
    mean: float
    std: float

    @classmethod
    def of(cls, row: Metric, images_per_round: int) -> MetricOut:
        trained_rounds = row.round - 1 if row.split == "rollout" else row.round
        return cls(
            round=row.round,
            split=row.split,
            scorer=row.scorer,
            version=row.version,
            model=row.model_id,
            training_images=trained_rounds * images_per_round,
            count=row.count,
            mean=row.mean,
            std=row.std,
        )


class TrainingOut(BaseModel):
    """How a round's training went: the figures of its last update, measured on the policy before that update.

    `log_ratio_preferred` and `log_ratio_rejected` are mean log-ratios to the policy before the round (dpo). The reports
    of all updates are in the file that `log` in the model's figures links.
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

    @classmethod
    def of(cls, row: Model) -> TrainingOut:
        figures = row.figures
        return cls(
            round=row.round or 0,
            model=row.id,
            examples=figures.get("examples", 0),
            updates=figures.get("updates", 0),
            loss=figures.get("last_loss"),
            accuracy=figures.get("last_accuracy"),
            log_ratio_preferred=figures.get("last_log_ratio_preferred"),
            log_ratio_rejected=figures.get("last_log_ratio_rejected"),
            below_epsilon=figures.get("last_below_epsilon"),
            grad_norm=figures.get("last_grad_norm"),
        )


class MetricsOut(BaseModel):
    """All metrics of a job, by round, split and scorer, and its trainings by round."""

    data: list[MetricOut]
    trainings: list[TrainingOut]


class ScoreOut(BaseModel):
    """What a scorer gave an image."""

    scorer: str
    version: str
    value: float

    @classmethod
    def of(cls, row: Score) -> ScoreOut:
        return cls(scorer=row.scorer, version=row.version, value=row.value)


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

    @classmethod
    def of(cls, row: Sample, scores: Sequence[Score]) -> SampleOut:
        return cls(**_sample_fields(row, scores))


def _sample_fields(row: Sample, scores: Sequence[Score]) -> dict[str, Any]:
    trajectory = None
    if row.trajectory_artifact_id is not None and row.trajectory_row is not None:
        trajectory = TrajectoryOut(artifact=f"/artifacts/{row.trajectory_artifact_id}", row=row.trajectory_row)
    return {
        "id": row.id,
        "job": row.job_id,
        "round": row.round,
        "role": row.role,
        "split": row.split,
        "prompt": row.prompt,
        "prompt_index": row.prompt_index,
        "number": row.number,
        "seed": row.seed,
        "model": row.model_id,
        "scores": [ScoreOut.of(score) for score in scores],
        "image": f"/artifacts/{row.image_artifact_id}",
        "trajectory": trajectory,
        "created_at": _time(row.created_at),
        "links": {"self": f"/samples/{row.id}", "job": f"/jobs/{row.job_id}", "model": f"/models/{row.model_id}"},
    }


class SideOut(BaseModel):
    """One of the images of a pair, with its score by the pair's scorer."""

    id: str
    seed: int
    score: float | None
    image: str
    href: str


class VerdictIn(BaseModel):
    """A person's word on a pair; `prefer` null takes it back."""

    model_config = ConfigDict(extra="forbid")

    prefer: Verdict | None
    reviewer: str | None = Field(None, min_length=1, max_length=100)


class VerdictOut(BaseModel):
    """What a person said of a pair."""

    prefer: Verdict
    reviewer: str | None
    at: datetime

    @classmethod
    def of(cls, row: Pair) -> VerdictOut | None:
        if row.verdict is None or row.verdict_at is None:
            return None
        return cls(prefer=Verdict(row.verdict), reviewer=row.verdict_by, at=_time(row.verdict_at))


class PairOut(BaseModel):
    """Base, reference and target side by side. `adopted` is null until the target is verified; `revision` counts
    verdicts and is the pair's ETag."""

    id: str
    job: str
    round: int
    number: int
    prompt: str
    prompt_index: int
    adopted: bool | None
    why: str | None
    verdict: VerdictOut | None
    revision: int
    scorer: str
    scorer_version: str
    thresholds: list[float] | None
    reference: SideOut
    base: SideOut
    target: SideOut | None
    figures: dict[str, Any]
    mask: str | None
    created_at: datetime
    links: Links

    @classmethod
    def of(cls, row: Pair, samples: Mapping[str, Sample]) -> PairOut:
        return cls(
            id=row.id,
            job=row.job_id,
            round=row.round,
            number=row.number,
            prompt=row.prompt,
            prompt_index=row.prompt_index,
            adopted=row.adopted,
            why=row.why,
            verdict=VerdictOut.of(row),
            revision=row.revision,
            scorer=row.scorer,
            scorer_version=row.scorer_version,
            thresholds=row.thresholds,
            reference=_side(samples[row.reference_id], row.reference_score),
            base=_side(samples[row.base_id], row.base_score),
            target=None if row.target_id is None else _side(samples[row.target_id], row.target_score),
            figures=row.figures,
            mask=_artifact_path(row.mask_artifact_id),
            created_at=_time(row.created_at),
            links={"self": f"/pairs/{row.id}", "job": f"/jobs/{row.job_id}"},
        )


def _side(row: Sample, score: float | None) -> SideOut:
    image = f"/artifacts/{row.image_artifact_id}"
    return SideOut(id=row.id, seed=row.seed, score=score, image=image, href=f"/samples/{row.id}")


class SampleDetail(SampleOut):
    """An image with the pairs that it is in (a reference may serve several)."""

    pairs: list[PairOut]

    @classmethod
    def detailed(
        cls, row: Sample, scores: Sequence[Score], pairs: Sequence[Pair], samples: Mapping[str, Sample]
    ) -> SampleDetail:
        return cls(**_sample_fields(row, scores), pairs=[PairOut.of(pair, samples) for pair in pairs])


class AdapterOut(BaseModel):
    """A trained adapter's file."""

    artifact: str
    sha256: str
    size_bytes: int


class ModelOut(BaseModel):
    """A base model (`name` set), or an adapter on one. `figures` say how its training went."""

    id: str
    name: str | None
    base: str
    parent: str | None
    job: str | None
    round: int | None
    adapter: AdapterOut | None
    aliases: list[str]
    figures: dict[str, Any]
    created_at: datetime
    links: Links

    @classmethod
    def of(cls, row: Model, adapter: Artifact | None, aliases: Sequence[str]) -> ModelOut:
        return cls(**_model_fields(row, adapter, aliases))


class ExportOut(BaseModel):
    """A model's adapter, or a job's pairs, in a form that other programs read. `figures` say how it was checked."""

    id: str
    model: str | None
    job: str | None
    format: str
    artifact: str
    figures: dict[str, Any]
    created_at: datetime

    @classmethod
    def of(cls, row: Export) -> ExportOut:
        return cls(
            id=row.id,
            model=row.model_id,
            job=row.of_job_id,
            format=row.format,
            artifact=f"/artifacts/{row.artifact_id}",
            figures=row.figures,
            created_at=_time(row.created_at),
        )


class ModelDetail(ModelOut):
    """A model with its lineage (itself, what it was trained from, and so on to the base model) and its exports."""

    lineage: list[str]
    exports: list[ExportOut]

    @classmethod
    def detailed(
        cls,
        row: Model,
        adapter: Artifact | None,
        aliases: Sequence[str],
        lineage: Sequence[Model],
        exports: Sequence[Export],
    ) -> ModelDetail:
        return cls(
            **_model_fields(row, adapter, aliases),
            lineage=[model.id for model in lineage],
            exports=[ExportOut.of(export) for export in exports],
        )


class AncestorOut(BaseModel):
    """A model of a lineage, with what it was trained by: job, seed and prompts."""

    model: str
    name: str | None
    base: str
    round: int | None
    job: str | None
    seed: int | None
    prompt_set: str | None
    pairs: str | None
    figures: dict[str, Any]

    @classmethod
    def of(cls, row: Model, job: Job | None) -> AncestorOut:
        return cls(
            model=row.id,
            name=row.name,
            base=row.base,
            round=row.round,
            job=row.job_id,
            seed=job.spec.get("seed") if job else None,
            prompt_set=job.prompt_set_id if job else None,
            pairs=f"/pairs?job={row.job_id}&round={row.round}" if row.job_id else None,
            figures=row.figures,
        )


class LineageOut(BaseModel):
    """A model and what it came from, down to the base model."""

    data: list[AncestorOut]


class AliasIn(BaseModel):
    """The model that a name shall mean."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(max_length=100)


def _model_fields(row: Model, adapter: Artifact | None, aliases: Sequence[str]) -> dict[str, Any]:
    links = {"self": f"/models/{row.id}", "lineage": f"/models/{row.id}/lineage"}
    if row.job_id is not None:
        links["job"] = f"/jobs/{row.job_id}"
    if row.parent_id is not None:
        links["parent"] = f"/models/{row.parent_id}"
    file = None
    if adapter is not None:
        file = AdapterOut(artifact=f"/artifacts/{adapter.id}", sha256=adapter.sha256, size_bytes=adapter.size_bytes)
    return {
        "id": row.id,
        "name": row.name,
        "base": row.base,
        "parent": row.parent_id,
        "job": row.job_id,
        "round": row.round,
        "adapter": file,
        "aliases": list(aliases),
        "figures": row.figures,
        "created_at": _time(row.created_at),
        "links": links,
    }


class PromptSetOut(BaseModel):
    """A prompt set in a list."""

    id: str
    name: str | None
    version: int
    description: str
    builtin: bool
    size: int
    created_at: datetime
    links: Links

    @classmethod
    def of(cls, row: PromptSet) -> PromptSetOut:
        return cls(**_prompt_set_fields(row))


class PromptSetDetail(PromptSetOut):
    """A prompt set with its prompts."""

    prompts: list[dict[str, Any]]

    @classmethod
    def detailed(cls, row: PromptSet) -> PromptSetDetail:
        return cls(**_prompt_set_fields(row), prompts=row.prompts)


def _prompt_set_fields(row: PromptSet) -> dict[str, Any]:
    return {
        "id": row.id,
        "name": row.name,
        "version": row.version,
        "description": row.description,
        "builtin": row.builtin,
        "size": len(row.prompts),
        "created_at": _time(row.created_at),
        "links": {"self": f"/prompt-sets/{row.id}"},
    }


class HealthOut(BaseModel):
    """Whether the service answers."""

    status: str


CheckState = Literal["ok", "warning", "wrong"]


class CheckOut(BaseModel):
    """Something that was looked at. `detail` says what was found and, unless it is ok, how to mend it."""

    name: str
    state: CheckState
    detail: str


class ReadyOut(BaseModel):
    """Whether the service can work (`unavailable`: it cannot; `degraded`: not all of it): its database answers, its
    worker (embedded mode) is alive, and what else it found when it looked."""

    status: Literal["ok", "degraded", "unavailable"]
    database: bool
    worker: bool | None
    checks: list[CheckOut]


class WorkerStageOut(BaseModel):
    """What a worker works on."""

    id: str
    job: str
    kind: str
    round: int


class WorkerOut(BaseModel):
    """A worker. `state`: idle, working, or silent where it has not reported for a while."""

    name: str
    state: str
    host: str
    pid: int
    queues: list[str]
    device: str
    model: str | None
    gpu_memory_bytes: int | None
    stage: WorkerStageOut | None
    started_at: datetime
    seen_at: datetime

    @classmethod
    def of(cls, row: Worker, stage: Stage | None, now: float, silent_after_seconds: float) -> WorkerOut:
        state = "idle" if stage is None else "working"
        if now - row.seen_at > silent_after_seconds:
            state = "silent"
        return cls(
            name=row.name,
            state=state,
            host=row.host,
            pid=row.pid,
            queues=row.queues,
            device=row.device,
            model=row.model,
            gpu_memory_bytes=row.gpu_memory_bytes,
            stage=stage
            and WorkerStageOut(id=stage.id, job=f"/jobs/{stage.job_id}", kind=stage.kind, round=stage.round),
            started_at=_time(row.started_at),
            seen_at=_time(row.seen_at),
        )


class WorkersOut(BaseModel):
    """All workers."""

    data: list[WorkerOut]


class ApiKeyIn(BaseModel):
    """A key to be made."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=100, description="Whose key, or what for")
    scopes: list[KeyScope] = Field(
        min_length=1, max_length=4, description="submit and review include read; admin includes all"
    )
    expires_at: AwareDatetime | None = Field(None, description="With a time zone; never if not given")

    @field_validator("expires_at")
    @classmethod
    def _has_a_date_in_utc(cls, at: datetime | None) -> datetime | None:
        """The west's last hours of the year 9999 are of the year 10000 in UTC, which no answer could show."""
        try:
            return None if at is None else at.astimezone(UTC)
        except OverflowError:
            raise ValueError("expected a time within the years 1 to 9999 in UTC") from None


class ApiKeyOut(BaseModel):
    """A key, without itself. `last_used_at` is some minutes coarse."""

    id: str
    name: str
    prefix: str
    scopes: list[KeyScope]
    active: bool
    created_at: datetime
    last_used_at: datetime | None
    expires_at: datetime | None
    revoked_at: datetime | None

    @classmethod
    def of(cls, row: ApiKey, now: float) -> ApiKeyOut:
        return cls(**_api_key_fields(row, now))


class ApiKeyMade(ApiKeyOut):
    """A key that was just made, with itself: it is not shown again."""

    key: str

    @classmethod
    def made(cls, row: ApiKey, now: float, token: str) -> ApiKeyMade:
        return cls(**_api_key_fields(row, now), key=token)


def _api_key_fields(row: ApiKey, now: float) -> dict[str, Any]:
    return {
        "id": row.id,
        "name": row.name,
        "prefix": row.prefix,
        "scopes": row.scopes,
        "active": row.revoked_at is None and (row.expires_at is None or row.expires_at > now),
        "created_at": _time(row.created_at),
        "last_used_at": _maybe_time(row.last_used_at),
        "expires_at": _maybe_time(row.expires_at),
        "revoked_at": _maybe_time(row.revoked_at),
    }
