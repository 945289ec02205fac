"""All tables of version 0.1.0.

The tables are written out here and do not follow later changes of `service.db.tables`.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001_tables"
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
    sa.Column("optimizer_artifact_id", sa.String(255), sa.ForeignKey("artifacts.id", use_alter=True), nullable=True),
    sa.Column("figures", sa.JSON(), nullable=False),
    sa.Column("created_at", sa.Double(), nullable=False),
    sa.UniqueConstraint("job_id", "round"),
    sa.UniqueConstraint("name"),
)

sa.Table(
    "api_keys",
    _metadata,
    sa.Column("id", sa.String(255), primary_key=True),
    sa.Column("name", sa.String(255), nullable=False),
    sa.Column("prefix", sa.String(255), nullable=False),
    sa.Column("sha256", sa.String(255), nullable=False),
    sa.Column("scopes", sa.JSON(), nullable=False),
    sa.Column("created_at", sa.Double(), nullable=False),
    sa.Column("last_used_at", sa.Double(), nullable=True),
    sa.Column("expires_at", sa.Double(), nullable=True),
    sa.Column("revoked_at", sa.Double(), nullable=True),
    sa.UniqueConstraint("sha256"),
    sa.Index(None, "prefix"),
)

sa.Table(
    "jobs",
    _metadata,
    sa.Column("id", sa.String(255), primary_key=True),
    sa.Column("kind", sa.String(255), nullable=False),
    sa.Column("state", sa.String(255), nullable=False),
    sa.Column("label", sa.String(255), nullable=True),
    sa.Column("spec", sa.JSON(), nullable=False),
    sa.Column("prompt_set_id", sa.String(255), sa.ForeignKey("prompt_sets.id"), nullable=True),
    sa.Column("held_out_prompt_set_id", sa.String(255), sa.ForeignKey("prompt_sets.id"), nullable=True),
    sa.Column("model_id", sa.String(255), sa.ForeignKey("models.id"), nullable=True),
    sa.Column("origin_id", sa.String(255), sa.ForeignKey("jobs.id"), nullable=True),
    sa.Column("result", sa.JSON(), nullable=True),
    sa.Column("rounds", sa.BigInteger(), nullable=False),
    sa.Column("work_total", sa.Double(), nullable=False),
    sa.Column("samples_made", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("pairs_made", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("models_made", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("created_at", sa.Double(), nullable=False),
    sa.Column("started_at", sa.Double(), nullable=True),
    sa.Column("finished_at", sa.Double(), nullable=True),
    sa.Column("cancel_requested_at", sa.Double(), nullable=True),
    sa.Column("pause_requested_at", sa.Double(), nullable=True),
    sa.Column("error_code", sa.String(255), nullable=True),
    sa.Column("error_message", sa.Text(), nullable=True),
    sa.Column("api_key_id", sa.String(255), sa.ForeignKey("api_keys.id"), nullable=True),
    sa.Index(None, "api_key_id"),
    sa.Index(None, "state"),
)

sa.Table(
    "stages",
    _metadata,
    sa.Column("id", sa.String(255), primary_key=True),
    sa.Column("job_id", sa.String(255), sa.ForeignKey("jobs.id"), nullable=False),
    sa.Column("number", sa.BigInteger(), nullable=False),
    sa.Column("kind", sa.String(255), nullable=False),
    sa.Column("queue", sa.String(255), nullable=False),
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
    sa.Column("unmet", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("not_before", sa.Double(), nullable=False),
    sa.Column("free_at", sa.Double(), nullable=True),
    sa.Column("hinted_at", sa.Double(), nullable=True),
    sa.Column("cancel_requested_at", sa.Double(), nullable=True),
    sa.Column("pause_requested_at", sa.Double(), nullable=True),
    sa.Column("checkpoint_key", sa.String(255), nullable=True),
    sa.Column("checkpoint_sha256", sa.String(255), nullable=True),
    sa.Column("checkpoint_at", sa.Double(), nullable=True),
    sa.Column("created_at", sa.Double(), nullable=False),
    sa.Column("started_at", sa.Double(), nullable=True),
    sa.Column("finished_at", sa.Double(), nullable=True),
    sa.Column("memory_bytes", sa.BigInteger(), nullable=True),
    sa.Column("error_code", sa.String(255), nullable=True),
    sa.Column("error_message", sa.Text(), nullable=True),
    sa.UniqueConstraint("job_id", "number"),
    sa.UniqueConstraint("job_id", "round", "kind", "shard"),
    sa.Index(None, "state", "lease_expires_at"),
    sa.Index(None, "state", "unmet", "job_id", "number"),
)

sa.Table(
    "stage_dependencies",
    _metadata,
    sa.Column("stage_id", sa.String(255), sa.ForeignKey("stages.id"), primary_key=True),
    sa.Column("needs_id", sa.String(255), sa.ForeignKey("stages.id"), primary_key=True),
    sa.Index(None, "needs_id"),
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
    sa.Index(None, "job_id"),
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
    sa.Column("prompt_set_id", sa.String(255), nullable=True),
    sa.Column("prompt_index", sa.BigInteger(), nullable=False),
    sa.Column("prompt", sa.Text(), nullable=False),
    sa.Column("number", sa.BigInteger(), nullable=False),
    sa.Column("seed", sa.BigInteger(), nullable=False),
    sa.Column("model_id", sa.String(255), sa.ForeignKey("models.id"), nullable=False),
    sa.Column("trajectory_artifact_id", sa.String(255), sa.ForeignKey("artifacts.id"), nullable=True),
    sa.Column("trajectory_row", sa.BigInteger(), nullable=True),
    sa.Column("image_artifact_id", sa.String(255), sa.ForeignKey("artifacts.id"), nullable=False),
    sa.Column("created_at", sa.Double(), nullable=False),
    sa.Index(None, "job_id", "id"),
    sa.Index(None, "job_id", "role", "id"),
    sa.Index(None, "job_id", "round", "id"),
    sa.Index(None, "job_id", "round", "role", "id"),
    sa.Index(None, "prompt_set_id", "id"),
    sa.Index(None, "prompt_set_id", "role", "id"),
    sa.Index(None, "role", "id"),
    sa.Index(None, "round", "id"),
    sa.Index(None, "trajectory_artifact_id"),
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
    sa.Column("prompt_set_id", sa.String(255), nullable=True),
    sa.Column("prompt_index", sa.BigInteger(), nullable=False),
    sa.Column("prompt", sa.Text(), nullable=False),
    sa.Column("reference_id", sa.String(255), sa.ForeignKey("samples.id"), nullable=False),
    sa.Column("base_id", sa.String(255), sa.ForeignKey("samples.id"), nullable=False),
    sa.Column("target_id", sa.String(255), sa.ForeignKey("samples.id"), nullable=True),
    sa.Column("adopted", sa.Boolean(), nullable=True),
    sa.Column("why", sa.Text(), nullable=True),
    sa.Column("scorer", sa.String(255), nullable=False),
    sa.Column("scorer_version", sa.String(), nullable=False),
    sa.Column("reference_score", sa.Double(), nullable=False),
    sa.Column("base_score", sa.Double(), nullable=False),
    sa.Column("target_score", sa.Double(), nullable=True),
    sa.Column("figures", sa.JSON(), nullable=False),
    sa.Column("mask_artifact_id", sa.String(255), sa.ForeignKey("artifacts.id"), nullable=True),
    sa.Column("thresholds", sa.JSON(), nullable=True),
    sa.Column("verdict", sa.String(255), nullable=True),
    sa.Column("verdict_by", sa.String(255), nullable=True),
    sa.Column("verdict_at", sa.Double(), nullable=True),
    sa.Column("revision", sa.BigInteger(), nullable=False),
    sa.Column("created_at", sa.Double(), nullable=False),
    sa.UniqueConstraint("job_id", "round", "number"),
    sa.Index(None, "adopted", "id"),
    sa.Index(None, "base_id"),
    sa.Index(None, "job_id", "adopted", "id"),
    sa.Index(None, "job_id", "id"),
    sa.Index(None, "job_id", "round", "id"),
    sa.Index(None, "prompt_set_id", "id"),
    sa.Index(None, "reference_id"),
    sa.Index(None, "round", "id"),
    sa.Index(None, "target_id"),
)

sa.Table(
    "metrics",
    _metadata,
    sa.Column("job_id", sa.String(255), sa.ForeignKey("jobs.id"), primary_key=True),
    sa.Column("round", sa.BigInteger(), primary_key=True),
    sa.Column("split", sa.String(255), primary_key=True),
    sa.Column("scorer", sa.String(255), primary_key=True),
    sa.Column("model_id", sa.String(255), sa.ForeignKey("models.id"), primary_key=True),
    sa.Column("version", sa.Text(), nullable=False),
    sa.Column("count", sa.BigInteger(), nullable=False),
    sa.Column("mean", sa.Double(), nullable=False),
    sa.Column("std", sa.Double(), nullable=False),
    sa.Column("created_at", sa.Double(), nullable=False),
)

sa.Table(
    "model_aliases",
    _metadata,
    sa.Column("name", sa.String(255), primary_key=True),
    sa.Column("model_id", sa.String(255), sa.ForeignKey("models.id"), nullable=False),
    sa.Column("updated_at", sa.Double(), nullable=False),
)

sa.Table(
    "exports",
    _metadata,
    sa.Column("id", sa.String(255), primary_key=True),
    sa.Column("job_id", sa.String(255), sa.ForeignKey("jobs.id"), nullable=False),
    sa.Column("model_id", sa.String(255), sa.ForeignKey("models.id"), nullable=True),
    sa.Column("of_job_id", sa.String(255), sa.ForeignKey("jobs.id"), nullable=True),
    sa.Column("format", sa.String(255), nullable=False),
    sa.Column("artifact_id", sa.String(255), sa.ForeignKey("artifacts.id"), nullable=False),
    sa.Column("figures", sa.JSON(), nullable=False),
    sa.Column("created_at", sa.Double(), nullable=False),
    sa.Index(None, "model_id"),
    sa.Index(None, "of_job_id"),
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
    sa.Index(None, "job_id"),
    sa.Index(None, "kind"),
)

sa.Table(
    "workers",
    _metadata,
    sa.Column("name", sa.String(255), primary_key=True),
    sa.Column("host", sa.String(255), nullable=False),
    sa.Column("pid", sa.BigInteger(), nullable=False),
    sa.Column("queues", sa.JSON(), nullable=False),
    sa.Column("device", sa.String(255), nullable=False),
    sa.Column("model", sa.String(255), nullable=True),
    sa.Column("gpu_memory_bytes", sa.BigInteger(), nullable=True),
    sa.Column("started_at", sa.Double(), nullable=False),
    sa.Column("seen_at", sa.Double(), nullable=False),
    sa.Index(None, "seen_at"),
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
