"""The tables. Times are seconds since 1970 (UTC) by the clock of the database, so that SQL can compare and add them.

A column whose name in the database differs from its key was renamed in the code only: during an upgrade, processes of
both versions use the database.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    false,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

Json = dict[str, Any]

_NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "pk": "pk_%(table_name)s",
}


def partial_index(name: str, where: str, *columns: str) -> Index:
    """An index of the rows for which `where` holds. It is used by queries that contain `where` as literal SQL."""
    return Index(name, *columns, postgresql_where=text(where), sqlite_where=text(where))


class Table(DeclarativeBase):
    """Base of all tables."""

    metadata = MetaData(naming_convention=_NAMING)
    type_annotation_map = {  # noqa: RUF012 - a class attribute of SQLAlchemy
        str: String(255),
        int: BigInteger(),
        float: Double(),
        Json: JSON(),
        list[Json]: JSON(),
        list[float]: JSON(),
    }


class PromptSet(Table):
    """Prompts with items and thresholds. Rows are immutable: changed prompts are a new version."""

    __tablename__ = "prompt_sets"
    __table_args__ = (UniqueConstraint("name", "version"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    """None if the prompts came with the request of a job, or if the set was deleted. Without a job that uses it, such a
    set is removed."""
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
    """The name of the base model in the catalogue."""
    parent_id: Mapped[str | None] = mapped_column(ForeignKey("models.id"), index=True)
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id", use_alter=True))
    stage_id: Mapped[str | None] = mapped_column(ForeignKey("stages.id", use_alter=True), index=True)
    round: Mapped[int | None]
    adapter_artifact_id: Mapped[str | None] = mapped_column(ForeignKey("artifacts.id", use_alter=True), index=True)
    optimizer_artifact_id: Mapped[str | None] = mapped_column(ForeignKey("artifacts.id", use_alter=True), index=True)
    """AdamW's moments after the training; a training of this model continues from them."""
    statistics: Mapped[Json] = mapped_column("figures", key="statistics")
    created_at: Mapped[float]


class ApiKey(Table):
    """An API key. Only its first characters and its SHA-256 are stored."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    prefix: Mapped[str] = mapped_column(index=True)
    sha256: Mapped[str] = mapped_column(unique=True)
    scopes: Mapped[list[str]] = mapped_column(JSON)
    created_at: Mapped[float]
    last_used_at: Mapped[float | None]
    """Updated every few minutes, not at each use."""
    expires_at: Mapped[float | None]
    revoked_at: Mapped[float | None]


class BrowserSession(Table):
    """A browser that has signed in with an API key. Only the SHA-256 of the session's token is stored."""

    __tablename__ = "browser_sessions"

    sha256: Mapped[str] = mapped_column(primary_key=True)
    api_key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"), index=True)
    created_at: Mapped[float]
    expires_at: Mapped[float] = mapped_column(index=True)


JOB_HAS_ENDED = "finished_at IS NOT NULL"
IS_DELETED = "deleted_at IS NOT NULL"
HAS_ENDED_AND_IS_KEPT = "finished_at IS NOT NULL AND deleted_at IS NULL"
HAS_BEST_AND_IS_KEPT = "best IS NOT NULL AND deleted_at IS NULL"
HAS_OLD_EVENTS = f"{HAS_ENDED_AND_IS_KEPT} AND events_removed_at IS NULL"
"""The condition for ended jobs whose events are removed when they are old enough."""


class Job(Table):
    """A job. `spec` is the checked request with its defaults filled in."""

    __tablename__ = "jobs"
    __table_args__ = (
        Index(None, "created_at", "id"),
        partial_index("ix_jobs_ended", JOB_HAS_ENDED, "trajectories_kept", "finished_at", "id"),
        partial_index("ix_jobs_deleted", IS_DELETED, "purge_at", "id"),
        partial_index("ix_jobs_retained", HAS_ENDED_AND_IS_KEPT, "state", "finished_at", "id"),
        partial_index("ix_jobs_with_events", HAS_OLD_EVENTS, "finished_at", "id"),
        partial_index("ix_jobs_with_best", HAS_BEST_AND_IS_KEPT, "id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    state: Mapped[str] = mapped_column(index=True)
    label: Mapped[str | None]
    priority: Mapped[int] = mapped_column(server_default="0")
    """Jobs with a higher priority run before other jobs of the same API key."""
    spec: Mapped[Json]
    prompt_set_id: Mapped[str | None] = mapped_column(ForeignKey("prompt_sets.id"), index=True)
    held_out_prompt_set_id: Mapped[str | None] = mapped_column(ForeignKey("prompt_sets.id"), index=True)
    model_id: Mapped[str | None] = mapped_column(ForeignKey("models.id"), index=True)
    """The model that the job starts from; the first model of an evaluation."""
    origin_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"), index=True)
    """The job that this one retries."""
    result: Mapped[Json | None]
    """The result of an evaluation: its comparison."""
    rounds: Mapped[int]
    """The number of rounds; of a run that stopped early, those before the stop."""
    best: Mapped[Json | None] = mapped_column(JSON(none_as_null=True))
    """The best round so far (`service.jobs.watching`): its model, and the mean that it was chosen by."""
    stopped: Mapped[Json | None] = mapped_column(JSON(none_as_null=True))
    """The warning sign after which a run stopped before its last round; None if it did not."""
    work_total: Mapped[float]
    """Expected work of all stages of all rounds, in U-Net evaluations."""
    samples_made: Mapped[int] = mapped_column(server_default="0")
    pairs_made: Mapped[int] = mapped_column(server_default="0")
    models_made: Mapped[int] = mapped_column(server_default="0")
    """The numbers of its rows, updated with each insert, since counting a million rows takes too long."""
    storage_bytes: Mapped[int] = mapped_column(server_default="0")
    """The bytes of its artifacts and of the current checkpoints of its stages, updated when they change."""
    work_done: Mapped[float] = mapped_column(server_default="0")
    """The work of the stages that have succeeded. This and the next two are updated when an attempt of a stage ends."""
    attempts: Mapped[int] = mapped_column(server_default="0")
    """The most attempts of a stage, without running ones."""
    last_round: Mapped[int | None]
    """The last round of which a stage has started, without running ones."""
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    rest_seconds: Mapped[float] = mapped_column(server_default="0")
    """How long the job has rested since its start: paused, waiting for verdicts, or ended before it continued."""
    rest_since: Mapped[float | None]
    """Since when the job rests; None while it runs."""
    cancel_requested_at: Mapped[float | None]
    pause_requested_at: Mapped[float | None]
    error_code: Mapped[str | None]
    error_message: Mapped[str | None] = mapped_column(Text)
    trajectories_kept: Mapped[str] = mapped_column(server_default="all")
    """The setting `keep_trajectories` that was applied to its trajectories since its end; "all" if none was."""
    api_key_id: Mapped[str | None] = mapped_column(ForeignKey("api_keys.id"), index=True)
    """The API key of the client; None if no keys are required."""
    events_removed_at: Mapped[float | None]
    """When its events were removed because of their age. A job that ends again later has new events."""
    deleted_at: Mapped[float | None]
    """When it was deleted. From then on, it and its results are not visible; collections remove their rows."""
    purge_at: Mapped[float | None]
    """When the next step of this removal is due."""


class JobSource(Table):
    """A job that another one uses: its samples, pairs or models. It cannot be deleted before that one."""

    __tablename__ = "job_sources"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    source_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True, index=True)


class JobPromptSet(Table):
    """A prompt set that a job uses. It cannot be deleted before that job."""

    __tablename__ = "job_prompt_sets"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    prompt_set_id: Mapped[str] = mapped_column(ForeignKey("prompt_sets.id"), primary_key=True, index=True)


_IS_FREE = "state = 'queued' AND unmet = 0"
IS_RUNNING = "state = 'running'"
"""No more stages run than there are workers, so that the index of these serves all queries for them."""
IS_UNFINISHED = "state IN ('held', 'queued', 'running', 'waiting')"
HAS_ENDED = "state IN ('cancelled', 'failed', 'succeeded')"
HAS_FAILED_ATTEMPT = "error_code IS NOT NULL AND state <> 'cancelled'"
WAS_TIMED = "state = 'succeeded' AND started_at IS NOT NULL"
IS_UNCOUNTED = "finished_at IS NOT NULL AND NOT is_counted"
HAS_CHECKPOINT = "checkpoint_key IS NOT NULL"
IS_UNCOLLECTED = "finished_at IS NOT NULL AND lease_epoch > 0 AND (collected_at IS NULL OR collected_at < finished_at)"
"""The condition for ended stages that may have left objects; those that never ran have none."""
_ORDER_OF_CLAIMS = ("queue", "fair_key", "base", "rank", "job_id", "number")


class Stage(Table):
    """A part of a job that one worker runs under a lease."""

    __tablename__ = "stages"
    __table_args__ = (
        UniqueConstraint("job_id", "round", "kind", "shard"),
        UniqueConstraint("job_id", "number"),
        Index(None, "queue", "fair_key", "started_at"),
        partial_index("ix_stages_unfinished", IS_UNFINISHED, "job_id", "state", "number"),
        partial_index("ix_stages_ended", HAS_ENDED, "job_id", "state", "number"),
        partial_index("ix_stages_running", IS_RUNNING, "queue", "fair_key"),
        partial_index("ix_stages_free", _IS_FREE, *_ORDER_OF_CLAIMS),
        partial_index("ix_stages_unhinted", f"{_IS_FREE} AND hinted_at IS NULL", "job_id"),
        partial_index("ix_stages_with_error", HAS_FAILED_ATTEMPT, "job_id", "number"),
        partial_index("ix_stages_timed", WAS_TIMED, "base", "kind", "finished_at"),
        partial_index("ix_stages_uncounted", IS_UNCOUNTED, "job_id"),
        partial_index("ix_stages_with_checkpoint", HAS_CHECKPOINT, "id"),
        partial_index("ix_stages_uncollected", IS_UNCOLLECTED, "finished_at", "id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    number: Mapped[int]
    """The number within the job, from 1. Free stages of a job are claimed in this order."""
    kind: Mapped[str]
    queue: Mapped[str]
    fair_key: Mapped[str] = mapped_column(server_default="")
    """The API key of the job; "" if none. Workers are shared fairly among these keys."""
    base: Mapped[str] = mapped_column(server_default="")
    """The name of the base model that the stage loads; "" if none."""
    rank: Mapped[int] = mapped_column(server_default="0")
    """The negative priority of the job, so that the index of free stages is ascending."""
    round: Mapped[int]
    shard: Mapped[int]
    params: Mapped[Json]
    work: Mapped[float]
    """Expected work in U-Net evaluations."""
    summary: Mapped[Json | None]
    """The summary of a stage that scores, for the stage that joins all shards (`worker.scoring.ScoringSummary`)."""
    state: Mapped[str]
    lease_owner: Mapped[str | None]
    lease_epoch: Mapped[int]
    lease_expires_at: Mapped[float | None]
    progress_done: Mapped[int]
    progress_total: Mapped[int]
    attempt: Mapped[int]
    crash_count: Mapped[int]
    failure_count: Mapped[int] = mapped_column(server_default="0")
    """Lost workers and failed attempts since the last checkpoint, each with its own limit."""
    unmet: Mapped[int] = mapped_column(server_default="0")
    """The number of dependencies that have not succeeded yet."""
    not_before: Mapped[float]
    free_at: Mapped[float | None]
    """When the stage was first marked as free. Claims and the pauses between hints are measured from it."""
    hinted_at: Mapped[float | None]
    cancel_requested_at: Mapped[float | None]
    pause_requested_at: Mapped[float | None]
    checkpoint_key: Mapped[str | None]
    checkpoint_sha256: Mapped[str | None]
    checkpoint_at: Mapped[float | None]
    checkpoint_bytes: Mapped[int] = mapped_column(server_default="0")
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    collected_at: Mapped[float | None]
    """When its leftover objects were removed after its end. A stage that ends again later is collected again."""
    is_counted: Mapped[bool] = mapped_column(server_default=false())
    """Whether the running sums of the job include the stage. False if a process of version 0.1.0 has ended it."""
    memory_bytes: Mapped[int | None]
    """Peak memory: of the GPU, or of the machine if the worker has no GPU."""
    error_code: Mapped[str | None]
    error_message: Mapped[str | None] = mapped_column(Text)


class StageDependency(Table):
    """`stage_id` may start only when `needs_id` has succeeded."""

    __tablename__ = "stage_dependencies"

    stage_id: Mapped[str] = mapped_column(ForeignKey("stages.id"), primary_key=True)
    needs_id: Mapped[str] = mapped_column(ForeignKey("stages.id"), primary_key=True, index=True)


class Artifact(Table):
    """A stored file. An object without such a row is removed by the next collection."""

    __tablename__ = "artifacts"
    __table_args__ = (UniqueConstraint("stage_id", "slot"), Index(None, "job_id", "id"))

    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    stage_id: Mapped[str] = mapped_column(ForeignKey("stages.id"))
    slot: Mapped[str]
    key: Mapped[str] = mapped_column(String(500), unique=True)
    sha256: Mapped[str]
    size_bytes: Mapped[int]
    media_type: Mapped[str]
    created_at: Mapped[float]


class Sample(Table):
    """An image, and its trajectory (row `trajectory_row` of a stored Trajectory).

    Frequent combinations of filters for lists have an index that ends with the id, the order of the pages.
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
        Index(None, "prompt", "id"),
        Index(None, "created_at", "id"),
        Index(None, "trajectory_artifact_id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    stage_id: Mapped[str] = mapped_column(ForeignKey("stages.id"), index=True)
    round: Mapped[int]
    role: Mapped[str]
    split: Mapped[str]
    prompt_set_id: Mapped[str | None]
    """The prompt set of the prompt, which lists are filtered by."""
    prompt_index: Mapped[int]
    prompt: Mapped[str] = mapped_column(Text)
    number: Mapped[int]
    """The number among the samples of the prompt; a target has the number of its base."""
    seed: Mapped[int]
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"), index=True)
    trajectory_artifact_id: Mapped[str | None] = mapped_column(ForeignKey("artifacts.id"))
    trajectory_row: Mapped[int | None]
    image_artifact_id: Mapped[str] = mapped_column(ForeignKey("artifacts.id"), index=True)
    created_at: Mapped[float]


class Score(Table):
    """The score of a sample by one version of a scorer."""

    __tablename__ = "scores"

    sample_id: Mapped[str] = mapped_column(ForeignKey("samples.id"), primary_key=True)
    scorer: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[float]


WITHOUT_VERDICT = "verdict IS NULL"
IS_JUDGED = "reviewers > 0"


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
        Index(None, "prompt", "id"),
        Index(None, "created_at", "id"),
        partial_index("ix_pairs_without_verdict", WITHOUT_VERDICT, "job_id", "round"),
        partial_index("ix_pairs_judged", IS_JUDGED, "id"),
        partial_index("ix_pairs_judged_of_job", IS_JUDGED, "job_id", "id"),
        partial_index("ix_pairs_judged_of_prompt_set", IS_JUDGED, "prompt_set_id", "id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    stage_id: Mapped[str] = mapped_column(ForeignKey("stages.id"), index=True)
    round: Mapped[int]
    number: Mapped[int]
    prompt_set_id: Mapped[str | None]
    """The prompt set of the prompt, which lists are filtered by."""

    prompt_index: Mapped[int]
    prompt: Mapped[str] = mapped_column(Text)
    reference_id: Mapped[str] = mapped_column(ForeignKey("samples.id"), index=True)
    base_id: Mapped[str] = mapped_column(ForeignKey("samples.id"), index=True)
    target_id: Mapped[str | None] = mapped_column(ForeignKey("samples.id"), index=True)
    adopted: Mapped[bool | None]
    reason: Mapped[str | None] = mapped_column("why", Text, key="reason")
    """Why the target was adopted or not, or why there is none."""
    scorer: Mapped[str]
    scorer_version: Mapped[str] = mapped_column(String())
    reference_score: Mapped[float]
    base_score: Mapped[float]
    target_score: Mapped[float | None]
    statistics: Mapped[Json] = mapped_column("figures", key="statistics")
    mask_artifact_id: Mapped[str | None] = mapped_column(ForeignKey("artifacts.id"), index=True)
    thresholds: Mapped[list[float] | None]
    """Mask thresholds, one per item. None: computed from the item maps when the pair is fused."""
    verdict: Mapped[str | None]
    """The combined verdict of all reviewers; None if there is none. It is updated with each of theirs."""
    verdict_by: Mapped[str | None]
    """The reviewer; None if several have given a verdict."""
    verdict_at: Mapped[float | None]
    """When the last of the verdicts was given."""
    reviewers: Mapped[int] = mapped_column(server_default="0")
    """The number of reviewers who have given a verdict."""
    review_exempt: Mapped[bool] = mapped_column(server_default=false())
    """Whether the review of its round does not wait for its verdict, because the sample has other pairs."""
    gold: Mapped[str | None]
    """The expected verdict of a gold pair, which measures how accurate reviewers are; None for other pairs."""
    revision: Mapped[int] = mapped_column(default=0)
    """The number of changes of verdicts."""
    created_at: Mapped[float]


class PairVerdict(Table):
    """The verdict of a reviewer on a pair. A removed one keeps its row, without `prefer`."""

    __tablename__ = "pair_verdicts"

    pair_id: Mapped[str] = mapped_column(ForeignKey("pairs.id"), primary_key=True)
    reviewer: Mapped[str] = mapped_column(primary_key=True)
    """The name of the reviewer; "" if none was given."""
    prefer: Mapped[str | None]
    revision: Mapped[int]
    """The revision of the pair that the last change of this verdict made."""
    created_at: Mapped[float]


class PreferenceTest(Table):
    """A human preference test: raters choose among the images that models made of the same prompts and seeds."""

    __tablename__ = "preference_tests"
    __table_args__ = (Index(None, "job_id", "id"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    """The evaluation that made the images. It cannot be deleted before the test."""
    models: Mapped[list[str]] = mapped_column(JSON)
    questions: Mapped[int]
    answers: Mapped[int] = mapped_column(server_default="0")
    """The number of its answers, updated with each of them."""
    created_at: Mapped[float]


class PreferenceQuestion(Table):
    """A prompt and a seed of a preference test."""

    __tablename__ = "preference_questions"

    test_id: Mapped[str] = mapped_column(ForeignKey("preference_tests.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    split: Mapped[str]
    samples: Mapped[list[str]] = mapped_column(JSON)
    """The ids of the samples, in the order of the models of the test."""


class PreferenceAnswer(Table):
    """The answer of a rater to a question of a preference test."""

    __tablename__ = "preference_answers"
    __table_args__ = (
        ForeignKeyConstraint(["test_id", "question"], ["preference_questions.test_id", "preference_questions.number"]),
        Index("ix_preference_answers_question", "test_id", "question"),
    )

    test_id: Mapped[str] = mapped_column(primary_key=True)
    rater: Mapped[str] = mapped_column(primary_key=True)
    question: Mapped[int] = mapped_column(primary_key=True)
    sample_id: Mapped[str | None] = mapped_column(ForeignKey("samples.id"), index=True)
    """The best image; None if none is better than all others."""
    position: Mapped[int | None]
    """Where it was shown, from 1."""
    answered_at: Mapped[float]


class Metric(Table):
    """Mean and standard deviation of a scorer over the images of one model, round and split."""

    __tablename__ = "metrics"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    split: Mapped[str] = mapped_column(primary_key=True)
    scorer: Mapped[str] = mapped_column(primary_key=True)
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"), primary_key=True, index=True)
    version: Mapped[str] = mapped_column(Text)
    count: Mapped[int]
    mean: Mapped[float]
    std: Mapped[float]
    created_at: Mapped[float]


class ModelAlias(Table):
    """An alias of a model, such as "champion". It can be moved to another model."""

    __tablename__ = "model_aliases"

    name: Mapped[str] = mapped_column(primary_key=True)
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"), index=True)
    updated_at: Mapped[float]


class Export(Table):
    """The adapter of a model, or the pairs of a job, in a format of other programs."""

    __tablename__ = "exports"

    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    """The export job."""
    model_id: Mapped[str | None] = mapped_column(ForeignKey("models.id"), index=True)
    of_job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"), index=True)
    format: Mapped[str]
    artifact_id: Mapped[str] = mapped_column(ForeignKey("artifacts.id"), index=True)
    preview_artifact_id: Mapped[str | None] = mapped_column(ForeignKey("artifacts.id"), index=True)
    """The preview of an adapter."""
    recipe: Mapped[Json | None] = mapped_column(JSON(none_as_null=True))
    """The `dfusion.recipes.Recipe` of the preview."""
    statistics: Mapped[Json] = mapped_column("figures", key="statistics")
    created_at: Mapped[float]


class Preview(Table):
    """Small images of a sample, made by a preview job: a strip of its denoising steps, and the masks of a reference.

    They go with the sample. A sample can have several, of which the newest is shown.
    """

    __tablename__ = "previews"

    sample_id: Mapped[str] = mapped_column(ForeignKey("samples.id"), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True, index=True)
    """The preview job."""
    num_steps: Mapped[int]
    steps: Mapped[list[int]] = mapped_column(JSON)
    """The states that the tiles of the strip show: 0 is noise, `num_steps` the image."""
    strip_artifact_id: Mapped[str] = mapped_column(ForeignKey("artifacts.id"), index=True)
    mask_artifact_id: Mapped[str | None] = mapped_column(ForeignKey("artifacts.id"), index=True)
    mask_settings: Mapped[Json | None] = mapped_column(JSON(none_as_null=True))
    """The thresholds and settings of the fusion that the masks are of."""
    created_at: Mapped[float]


class Event(Table):
    """An event in the log of a job. Ids are in order."""

    __tablename__ = "events"

    id: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer(), "sqlite"), primary_key=True, autoincrement=True
    )
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    stage_id: Mapped[str | None] = mapped_column(ForeignKey("stages.id"), index=True)
    at: Mapped[float]
    kind: Mapped[str] = mapped_column(index=True)
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[Json]


class Worker(Table):
    """The last report of a worker process. The leases of stages show what it works on."""

    __tablename__ = "workers"

    name: Mapped[str] = mapped_column(primary_key=True)
    """The name of the worker, which is the owner of its leases."""
    host: Mapped[str]
    pid: Mapped[int]
    queues: Mapped[list[str]] = mapped_column(JSON())
    device: Mapped[str]
    model: Mapped[str | None]
    """The loaded base model."""
    gpu_memory_bytes: Mapped[int | None]
    """GPU memory that torch has reserved; None on a CPU."""
    started_at: Mapped[float]
    seen_at: Mapped[float] = mapped_column(index=True)


class IdempotencyKey(Table):
    """The Idempotency-Key of a request, a hash of the request, and the job that it created."""

    __tablename__ = "idempotency_keys"

    key: Mapped[str] = mapped_column(primary_key=True)
    fingerprint: Mapped[str]
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    created_at: Mapped[float] = mapped_column(index=True)


class Webhook(Table):
    """A URL that receives messages about jobs. Removed ones keep their row, since deliveries reference it."""

    __tablename__ = "webhooks"
    __table_args__ = (partial_index("ix_webhooks_enabled", "disabled_at IS NULL", "id"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    url: Mapped[str] = mapped_column(Text)
    events: Mapped[list[str]] = mapped_column(JSON)
    secret: Mapped[str]
    """The key of the signatures; "" once the webhook is disabled. A hash is not sufficient: each delivery is signed."""
    created_at: Mapped[float]
    disabled_at: Mapped[float | None]
    disabled_reason: Mapped[str | None]


class WebhookDelivery(Table):
    """A message to a webhook, written in the transaction of the change that it reports."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        partial_index("ix_webhook_deliveries_due", "state = 'pending'", "webhook_id", "next_attempt_at"),
        Index(None, "webhook_id", "id"),
        Index(None, "created_at"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    webhook_id: Mapped[str] = mapped_column(ForeignKey("webhooks.id"))
    job_id: Mapped[str]
    """Not a foreign key: a delivery may outlive its job."""
    event: Mapped[str]
    body: Mapped[str] = mapped_column(Text)
    state: Mapped[str]
    attempts: Mapped[int]
    next_attempt_at: Mapped[float]
    """When it is due; while it is being sent, when it counts as lost."""
    last_status: Mapped[int | None]
    last_error: Mapped[str | None]
    created_at: Mapped[float]
    delivered_at: Mapped[float | None]
