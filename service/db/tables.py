"""The tables. Times are seconds since 1970 (UTC) by the database's clock: leases add up without dialects."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, Double, ForeignKey, Index, Integer, MetaData, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

Json = dict[str, Any]

_NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "pk": "pk_%(table_name)s",
}


class Table(DeclarativeBase):
    """Base of all tables."""

    metadata = MetaData(naming_convention=_NAMING)
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy reads it from the class
        str: String(255),
        int: BigInteger(),
        float: Double(),
        Json: JSON(),
        list[Json]: JSON(),
        list[float]: JSON(),
    }


class PromptSet(Table):
    """Prompts with items and thresholds. Rows never change: a changed built-in list is a new version."""

    __tablename__ = "prompt_sets"
    __table_args__ = (UniqueConstraint("name", "version"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    """None: given inline with a job."""
    version: Mapped[int]
    description: Mapped[str] = mapped_column(Text)
    builtin: Mapped[bool]
    prompts: Mapped[list[Json]]
    sha256: Mapped[str]
    created_at: Mapped[float]


class Model(Table):
    """A base model of the catalogue (`name` set), or an adapter that a round trained on its parent."""

    __tablename__ = "models"
    __table_args__ = (UniqueConstraint("job_id", "round"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str | None] = mapped_column(unique=True)
    base: Mapped[str]
    """The catalogue's name of the base model."""
    parent_id: Mapped[str | None] = mapped_column(ForeignKey("models.id"))
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id", use_alter=True))
    stage_id: Mapped[str | None] = mapped_column(ForeignKey("stages.id", use_alter=True))
    round: Mapped[int | None]
    adapter_artifact_id: Mapped[str | None] = mapped_column(ForeignKey("artifacts.id", use_alter=True))
    optimizer_artifact_id: Mapped[str | None] = mapped_column(ForeignKey("artifacts.id", use_alter=True))
    """AdamW's moments after the training, from which a training of this model goes on."""
    figures: Mapped[Json]
    created_at: Mapped[float]


class ApiKey(Table):
    """A key to the API. Of the key itself only the first characters and the SHA-256 are kept."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    prefix: Mapped[str] = mapped_column(index=True)
    sha256: Mapped[str] = mapped_column(unique=True)
    scopes: Mapped[list[str]] = mapped_column(JSON)
    created_at: Mapped[float]
    last_used_at: Mapped[float | None]
    """Noted every few minutes, not at each use."""
    expires_at: Mapped[float | None]
    revoked_at: Mapped[float | None]


class Job(Table):
    """What a client asked for. `spec` is the checked request with its defaults filled in."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    state: Mapped[str] = mapped_column(index=True)
    label: Mapped[str | None]
    spec: Mapped[Json]
    prompt_set_id: Mapped[str | None] = mapped_column(ForeignKey("prompt_sets.id"))
    held_out_prompt_set_id: Mapped[str | None] = mapped_column(ForeignKey("prompt_sets.id"))
    model_id: Mapped[str | None] = mapped_column(ForeignKey("models.id"))
    """The model that it starts from; the first of an evaluation's."""
    origin_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"))
    """The job that it is a retry of."""
    result: Mapped[Json | None]
    """What it found: an evaluation's comparison."""
    rounds: Mapped[int]
    work_total: Mapped[float]
    """Expected work of all stages of all rounds, in U-Net evaluations."""
    samples_made: Mapped[int] = mapped_column(server_default="0")
    pairs_made: Mapped[int] = mapped_column(server_default="0")
    models_made: Mapped[int] = mapped_column(server_default="0")
    """Counted as they are made: counting a million rows takes too long."""
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    cancel_requested_at: Mapped[float | None]
    pause_requested_at: Mapped[float | None]
    error_code: Mapped[str | None]
    error_message: Mapped[str | None] = mapped_column(Text)
    api_key_id: Mapped[str | None] = mapped_column(ForeignKey("api_keys.id"), index=True)
    """Whose key made it; None where no keys are asked for."""


class Stage(Table):
    """A piece of a job that one worker does under a lease (durability: claim, heartbeat, fence)."""

    __tablename__ = "stages"
    __table_args__ = (
        UniqueConstraint("job_id", "round", "kind", "shard"),
        UniqueConstraint("job_id", "number"),
        Index(None, "state", "lease_expires_at"),
        Index(None, "state", "unmet", "job_id", "number"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    number: Mapped[int]
    """Running number within the job: the order in which free stages are claimed."""
    kind: Mapped[str]
    queue: Mapped[str]
    round: Mapped[int]
    shard: Mapped[int]
    params: Mapped[Json]
    work: Mapped[float]
    """Expected work in U-Net evaluations."""
    state: Mapped[str]
    lease_owner: Mapped[str | None]
    lease_epoch: Mapped[int]
    lease_expires_at: Mapped[float | None]
    progress_done: Mapped[int]
    progress_total: Mapped[int]
    progress_at: Mapped[float | None]
    attempt: Mapped[int]
    crash_count: Mapped[int]
    unmet: Mapped[int] = mapped_column(server_default="0")
    """How many of the stages that it needs have not succeeded yet."""
    not_before: Mapped[float]
    free_at: Mapped[float | None]
    """When it became free, as far as noticed; claims and pauses between hints are measured from it."""
    hinted_at: Mapped[float | None]
    cancel_requested_at: Mapped[float | None]
    pause_requested_at: Mapped[float | None]
    checkpoint_key: Mapped[str | None]
    checkpoint_sha256: Mapped[str | None]
    checkpoint_at: Mapped[float | None]
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    memory_bytes: Mapped[int | None]
    """The most that it took: of the GPU's memory, or of the machine's where its worker had no GPU."""
    error_code: Mapped[str | None]
    error_message: Mapped[str | None] = mapped_column(Text)


class StageDependency(Table):
    """`stage_id` may start only when `needs_id` has succeeded."""

    __tablename__ = "stage_dependencies"

    stage_id: Mapped[str] = mapped_column(ForeignKey("stages.id"), primary_key=True)
    needs_id: Mapped[str] = mapped_column(ForeignKey("stages.id"), primary_key=True, index=True)


class Artifact(Table):
    """A stored file. Its object exists only if this row does."""

    __tablename__ = "artifacts"
    __table_args__ = (UniqueConstraint("stage_id", "slot"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    stage_id: Mapped[str] = mapped_column(ForeignKey("stages.id"))
    slot: Mapped[str]
    key: Mapped[str] = mapped_column(String(500), unique=True)
    sha256: Mapped[str]
    size_bytes: Mapped[int]
    media_type: Mapped[str]
    created_at: Mapped[float]


class Sample(Table):
    """An image with the trajectory that made it (row `trajectory_row` of a stored Trajectory).

    Each way of listing samples has an index that ends with the id, in whose order a list's pages follow.
    """

    __tablename__ = "samples"
    __table_args__ = (
        Index(None, "job_id", "id"),
        Index(None, "job_id", "role", "id"),
        Index(None, "job_id", "round", "id"),
        Index(None, "job_id", "round", "role", "id"),
        Index(None, "prompt_set_id", "id"),
        Index(None, "prompt_set_id", "role", "id"),
        Index(None, "role", "id"),
        Index(None, "round", "id"),
        Index(None, "trajectory_artifact_id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    stage_id: Mapped[str] = mapped_column(ForeignKey("stages.id"))
    round: Mapped[int]
    role: Mapped[str]
    split: Mapped[str]
    prompt_set_id: Mapped[str | None]
    """The set that the prompt is of, beside the job's own record of it: lists are filtered by it."""
    prompt_index: Mapped[int]
    prompt: Mapped[str] = mapped_column(Text)
    number: Mapped[int]
    """Which of the prompt's samples it is; for a target, that of its base."""
    seed: Mapped[int]
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"))
    trajectory_artifact_id: Mapped[str | None] = mapped_column(ForeignKey("artifacts.id"))
    trajectory_row: Mapped[int | None]
    image_artifact_id: Mapped[str] = mapped_column(ForeignKey("artifacts.id"))
    created_at: Mapped[float]


class Score(Table):
    """What a scorer gave a sample."""

    __tablename__ = "scores"

    sample_id: Mapped[str] = mapped_column(ForeignKey("samples.id"), primary_key=True)
    scorer: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[float]


class Pair(Table):
    """A reference, a base and the target fused from them. `adopted` is None until the target is verified."""

    __tablename__ = "pairs"
    __table_args__ = (
        UniqueConstraint("job_id", "round", "number"),
        Index(None, "job_id", "id"),
        Index(None, "job_id", "round", "id"),
        Index(None, "job_id", "adopted", "id"),
        Index(None, "prompt_set_id", "id"),
        Index(None, "round", "id"),
        Index(None, "adopted", "id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    stage_id: Mapped[str] = mapped_column(ForeignKey("stages.id"))
    round: Mapped[int]
    number: Mapped[int]
    prompt_set_id: Mapped[str | None]
    """As in samples."""
    prompt_index: Mapped[int]
    prompt: Mapped[str] = mapped_column(Text)
    reference_id: Mapped[str] = mapped_column(ForeignKey("samples.id"), index=True)
    base_id: Mapped[str] = mapped_column(ForeignKey("samples.id"), index=True)
    target_id: Mapped[str | None] = mapped_column(ForeignKey("samples.id"), index=True)
    adopted: Mapped[bool | None]
    why: Mapped[str | None] = mapped_column(Text)
    scorer: Mapped[str]
    scorer_version: Mapped[str] = mapped_column(String())
    reference_score: Mapped[float]
    base_score: Mapped[float]
    target_score: Mapped[float | None]
    figures: Mapped[Json]
    mask_artifact_id: Mapped[str | None] = mapped_column(ForeignKey("artifacts.id"))
    thresholds: Mapped[list[float] | None]
    """Mask thresholds, one an item; None: found from its prompt's maps when it is fused."""
    verdict: Mapped[str | None]
    verdict_by: Mapped[str | None]
    verdict_at: Mapped[float | None]
    revision: Mapped[int] = mapped_column(default=0)
    """Counts verdicts, so that two reviewers do not overwrite each other unseen."""
    created_at: Mapped[float]


class Metric(Table):
    """Scores of one round's images of one model together."""

    __tablename__ = "metrics"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    split: Mapped[str] = mapped_column(primary_key=True)
    scorer: Mapped[str] = mapped_column(primary_key=True)
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"), primary_key=True)
    version: Mapped[str] = mapped_column(Text)
    count: Mapped[int]
    mean: Mapped[float]
    std: Mapped[float]
    created_at: Mapped[float]


class ModelAlias(Table):
    """A name that people give a model, such as "champion"; it can move to another."""

    __tablename__ = "model_aliases"

    name: Mapped[str] = mapped_column(primary_key=True)
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"))
    updated_at: Mapped[float]


class Export(Table):
    """A model's adapter, or a job's pairs, in a form that other programs read."""

    __tablename__ = "exports"

    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    """The export's own job."""
    model_id: Mapped[str | None] = mapped_column(ForeignKey("models.id"), index=True)
    of_job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"), index=True)
    format: Mapped[str]
    artifact_id: Mapped[str] = mapped_column(ForeignKey("artifacts.id"))
    figures: Mapped[Json]
    created_at: Mapped[float]


class Event(Table):
    """Something that happened to a job, in order."""

    __tablename__ = "events"

    id: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer(), "sqlite"), primary_key=True, autoincrement=True
    )
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    stage_id: Mapped[str | None] = mapped_column(ForeignKey("stages.id"))
    at: Mapped[float]
    kind: Mapped[str] = mapped_column(index=True)
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[Json]


class Worker(Table):
    """A worker process, as it last reported. What it works on is in the stages' leases."""

    __tablename__ = "workers"

    name: Mapped[str] = mapped_column(primary_key=True)
    """The owner of its leases."""
    host: Mapped[str]
    pid: Mapped[int]
    queues: Mapped[list[str]] = mapped_column(JSON())
    device: Mapped[str]
    model: Mapped[str | None]
    """The base model that it has loaded."""
    gpu_memory_bytes: Mapped[int | None]
    """Memory of its GPU that torch holds; None on a CPU."""
    started_at: Mapped[float]
    seen_at: Mapped[float] = mapped_column(index=True)


class IdempotencyKey(Table):
    """A client's key, the request that it came with and the job that it made."""

    __tablename__ = "idempotency_keys"

    key: Mapped[str] = mapped_column(primary_key=True)
    fingerprint: Mapped[str]
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[float]
