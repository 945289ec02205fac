"""All tables of the first version.

The tables are written out here and do not follow later changes of `service.db.tables`.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

sa.Table(
    "prompt_sets",
    _metadata,
    sa.Column("id", sa.String(255), primary_key=True),
    sa.Column("name", sa.String(255), nullable=True),
    sa.Column("version", sa.BigInteger(), nullable=False),
    sa.Column("description", sa.Text(), nullable=False),
    sa.Column("builtin", sa.Boolean(), nullable=False),
    sa.Column("prompts", sa.JSON(), nullable=False),
    sa.Column("sha256", sa.String(255), nullable=False),
    sa.Column("created_at", sa.Double(), nullable=False),
    sa.UniqueConstraint("name", "version"),
)

sa.Table(
    "models",
    _metadata,
    sa.Column("id", sa.String(255), primary_key=True),
    sa.Column("name", sa.String(255), nullable=True),
    sa.Column("base", sa.String(255), nullable=False),
    sa.Column("parent_id", sa.String(255), sa.ForeignKey("models.id"), nullable=True),
    sa.Column("job_id", sa.String(255), sa.ForeignKey("jobs.id", use_alter=True), nullable=True),
    sa.Column("stage_id", sa.String(255), sa.ForeignKey("stages.id", use_alter=True), nullable=True),
    sa.Column("round", sa.BigInteger(), nullable=True),
    sa.Column("adapter_artifact_id", sa.String(255), sa.ForeignKey("artifacts.id", use_alter=True), nullable=True),
    sa.Column("figures", sa.JSON(), nullable=False),
    sa.Column("created_at", sa.Double(), nullable=False),
    sa.UniqueConstraint("job_id", "round"),
    sa.UniqueConstraint("name"),
)

sa.Table(
    "jobs",
    _metadata,
    sa.Column("id", sa.String(255), primary_key=True),
    sa.Column("kind", sa.String(255), nullable=False),
    sa.Column("state", sa.String(255), nullable=False),
    sa.Column("label", sa.String(255), nullable=True),
    sa.Column("spec", sa.JSON(), nullable=False),
    sa.Column("prompt_set_id", sa.String(255), sa.ForeignKey("prompt_sets.id"), nullable=False),
    sa.Column("held_out_prompt_set_id", sa.String(255), sa.ForeignKey("prompt_sets.id"), nullable=True),
    sa.Column("model_id", sa.String(255), sa.ForeignKey("models.id"), nullable=False),
    sa.Column("rounds", sa.BigInteger(), nullable=False),
    sa.Column("work_total", sa.Double(), nullable=False),
    sa.Column("created_at", sa.Double(), nullable=False),
    sa.Column("started_at", sa.Double(), nullable=True),
    sa.Column("finished_at", sa.Double(), nullable=True),
    sa.Column("cancel_requested_at", sa.Double(), nullable=True),
    sa.Column("error_code", sa.String(255), nullable=True),
    sa.Column("error_message", sa.Text(), nullable=True),
    sa.Index("ix_jobs_state", "state"),
)

sa.Table(
    "stages",
    _metadata,
    sa.Column("id", sa.String(255), primary_key=True),
    sa.Column("job_id", sa.String(255), sa.ForeignKey("jobs.id"), nullable=False),
    sa.Column("number", sa.BigInteger(), nullable=False),
    sa.Column("kind", sa.String(255), nullable=False),
    sa.Column("round", sa.BigInteger(), nullable=False),
    sa.Column("shard", sa.BigInteger(), nullable=False),
    sa.Column("params", sa.JSON(), nullable=False),
    sa.Column("work", sa.Double(), nullable=False),
    sa.Column("state", sa.String(255), nullable=False),
    sa.Column("lease_owner", sa.String(255), nullable=True),
    sa.Column("lease_epoch", sa.BigInteger(), nullable=False),
    sa.Column("lease_expires_at", sa.Double(), nullable=True),
    sa.Column("progress_done", sa.BigInteger(), nullable=False),
    sa.Column("progress_total", sa.BigInteger(), nullable=False),
    sa.Column("progress_at", sa.Double(), nullable=True),
    sa.Column("attempt", sa.BigInteger(), nullable=False),
    sa.Column("crash_count", sa.BigInteger(), nullable=False),
    sa.Column("not_before", sa.Double(), nullable=False),
    sa.Column("hinted_at", sa.Double(), nullable=True),
    sa.Column("cancel_requested_at", sa.Double(), nullable=True),
    sa.Column("checkpoint_key", sa.String(255), nullable=True),
    sa.Column("checkpoint_sha256", sa.String(255), nullable=True),
    sa.Column("checkpoint_at", sa.Double(), nullable=True),
    sa.Column("created_at", sa.Double(), nullable=False),
    sa.Column("started_at", sa.Double(), nullable=True),
    sa.Column("finished_at", sa.Double(), nullable=True),
    sa.Column("error_code", sa.String(255), nullable=True),
    sa.Column("error_message", sa.Text(), nullable=True),
    sa.UniqueConstraint("job_id", "number"),
    sa.UniqueConstraint("job_id", "round", "kind", "shard"),
    sa.Index("ix_stages_state_not_before", "state", "not_before"),
)

sa.Table(
    "stage_dependencies",
    _metadata,
    sa.Column("stage_id", sa.String(255), sa.ForeignKey("stages.id"), primary_key=True),
    sa.Column("needs_id", sa.String(255), sa.ForeignKey("stages.id"), primary_key=True),
    sa.Index("ix_stage_dependencies_needs_id", "needs_id"),
)

sa.Table(
    "artifacts",
    _metadata,
    sa.Column("id", sa.String(255), primary_key=True),
    sa.Column("job_id", sa.String(255), sa.ForeignKey("jobs.id"), nullable=False),
    sa.Column("stage_id", sa.String(255), sa.ForeignKey("stages.id"), nullable=False),
    sa.Column("slot", sa.String(255), nullable=False),
    sa.Column("key", sa.String(500), nullable=False),
    sa.Column("sha256", sa.String(255), nullable=False),
    sa.Column("size_bytes", sa.BigInteger(), nullable=False),
    sa.Column("media_type", sa.String(255), nullable=False),
    sa.Column("created_at", sa.Double(), nullable=False),
    sa.UniqueConstraint("key"),
    sa.UniqueConstraint("stage_id", "slot"),
    sa.Index("ix_artifacts_job_id", "job_id"),
)

sa.Table(
    "samples",
    _metadata,
    sa.Column("id", sa.String(255), primary_key=True),
    sa.Column("job_id", sa.String(255), sa.ForeignKey("jobs.id"), nullable=False),
    sa.Column("stage_id", sa.String(255), sa.ForeignKey("stages.id"), nullable=False),
    sa.Column("round", sa.BigInteger(), nullable=False),
    sa.Column("role", sa.String(255), nullable=False),
    sa.Column("split", sa.String(255), nullable=False),
    sa.Column("prompt_index", sa.BigInteger(), nullable=False),
    sa.Column("prompt", sa.Text(), nullable=False),
    sa.Column("number", sa.BigInteger(), nullable=False),
    sa.Column("seed", sa.BigInteger(), nullable=False),
    sa.Column("model_id", sa.String(255), sa.ForeignKey("models.id"), nullable=False),
    sa.Column("trajectory_artifact_id", sa.String(255), sa.ForeignKey("artifacts.id"), nullable=True),
    sa.Column("trajectory_row", sa.BigInteger(), nullable=True),
    sa.Column("image_artifact_id", sa.String(255), sa.ForeignKey("artifacts.id"), nullable=False),
    sa.Column("created_at", sa.Double(), nullable=False),
    sa.Index("ix_samples_job_id_round_role", "job_id", "round", "role"),
)

sa.Table(
    "scores",
    _metadata,
    sa.Column("sample_id", sa.String(255), sa.ForeignKey("samples.id"), primary_key=True),
    sa.Column("scorer", sa.String(255), primary_key=True),
    sa.Column("version", sa.String(255), primary_key=True),
    sa.Column("value", sa.Double(), nullable=False),
)

sa.Table(
    "pairs",
    _metadata,
    sa.Column("id", sa.String(255), primary_key=True),
    sa.Column("job_id", sa.String(255), sa.ForeignKey("jobs.id"), nullable=False),
    sa.Column("stage_id", sa.String(255), sa.ForeignKey("stages.id"), nullable=False),
    sa.Column("round", sa.BigInteger(), nullable=False),
    sa.Column("number", sa.BigInteger(), nullable=False),
    sa.Column("prompt_index", sa.BigInteger(), nullable=False),
    sa.Column("prompt", sa.Text(), nullable=False),
    sa.Column("reference_id", sa.String(255), sa.ForeignKey("samples.id"), nullable=False),
    sa.Column("base_id", sa.String(255), sa.ForeignKey("samples.id"), nullable=False),
    sa.Column("target_id", sa.String(255), sa.ForeignKey("samples.id"), nullable=True),
    sa.Column("adopted", sa.Boolean(), nullable=True),
    sa.Column("why", sa.Text(), nullable=True),
    sa.Column("scorer", sa.String(255), nullable=False),
    sa.Column("reference_score", sa.Double(), nullable=False),
    sa.Column("base_score", sa.Double(), nullable=False),
    sa.Column("target_score", sa.Double(), nullable=True),
    sa.Column("figures", sa.JSON(), nullable=False),
    sa.Column("mask_artifact_id", sa.String(255), sa.ForeignKey("artifacts.id"), nullable=True),
    sa.Column("created_at", sa.Double(), nullable=False),
    sa.UniqueConstraint("job_id", "round", "number"),
    sa.Index("ix_pairs_base_id", "base_id"),
    sa.Index("ix_pairs_reference_id", "reference_id"),
    sa.Index("ix_pairs_target_id", "target_id"),
)

sa.Table(
    "metrics",
    _metadata,
    sa.Column("job_id", sa.String(255), sa.ForeignKey("jobs.id"), primary_key=True),
    sa.Column("round", sa.BigInteger(), primary_key=True),
    sa.Column("split", sa.String(255), primary_key=True),
    sa.Column("scorer", sa.String(255), primary_key=True),
    sa.Column("version", sa.String(255), nullable=False),
    sa.Column("model_id", sa.String(255), sa.ForeignKey("models.id"), nullable=False),
    sa.Column("count", sa.BigInteger(), nullable=False),
    sa.Column("mean", sa.Double(), nullable=False),
    sa.Column("std", sa.Double(), nullable=False),
    sa.Column("created_at", sa.Double(), nullable=False),
)

sa.Table(
    "events",
    _metadata,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("job_id", sa.String(255), sa.ForeignKey("jobs.id"), nullable=False),
    sa.Column("stage_id", sa.String(255), sa.ForeignKey("stages.id"), nullable=True),
    sa.Column("at", sa.Double(), nullable=False),
    sa.Column("kind", sa.String(255), nullable=False),
    sa.Column("message", sa.Text(), nullable=False),
    sa.Column("data", sa.JSON(), nullable=False),
    sa.Index("ix_events_job_id", "job_id"),
)

sa.Table(
    "idempotency_keys",
    _metadata,
    sa.Column("key", sa.String(255), primary_key=True),
    sa.Column("fingerprint", sa.String(255), nullable=False),
    sa.Column("job_id", sa.String(255), sa.ForeignKey("jobs.id"), nullable=False),
    sa.Column("created_at", sa.Double(), nullable=False),
)


def upgrade() -> None:
    _metadata.create_all(op.get_bind(), checkfirst=False)


def downgrade() -> None:
    _metadata.drop_all(op.get_bind(), checkfirst=False)
